//! `beamline completions`: prints a script that completes commands and flags in a shell.

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, output};

/// Flags of `completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Try it:
  source <(beamline completions bash)                                   in this shell
  beamline completions bash > ~/.local/share/bash-completion/completions/beamline
  beamline completions zsh > \"${fpath[1]}/_beamline\"
  beamline completions fish > ~/.config/fish/completions/beamline.fish")]
pub(super) struct Args {
    /// The shell that will run the script.
    shell: Shell,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "beamline", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
