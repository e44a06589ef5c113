//! The attacks, one file each.

mod files;
mod floods;
mod forgery;
mod garbage;
mod hang_ups;
mod idle;
mod lies;
mod log;
mod neighbours;
mod prompts;
mod signals;
mod silent_readers;
mod slow_bodies;
mod slow_heads;
mod state;
mod truncated;
mod uploads;

use anyhow::Result;

use super::arena::Arena;
use super::outcome::{Loss, Outcome};

/// One attack of the list.
pub(super) struct Attack {
    pub(super) name: &'static str,
    /// What it does, for people.
    pub(super) what: &'static str,
    /// What others may lose by it.
    pub(super) loss: Loss,
    pub(super) run: fn(&Arena) -> Result<Outcome>,
}

/// All of them.
pub(super) const ATTACKS: &[Attack] = &[
    Attack {
        name: "slow-heads",
        what: "500 clients send the head of a request a byte at a time",
        loss: Loss::Nothing,
        run: slow_heads::run,
    },
    Attack {
        name: "slow-bodies",
        what: "1,300 clients send a head and 13 bytes of the body",
        loss: Loss::Nothing,
        run: slow_bodies::run,
    },
    Attack {
        name: "silent-readers",
        what: "60 clients ask for much and read nothing, at 40 connections; then a drain",
        loss: Loss::Nothing,
        run: silent_readers::run,
    },
    Attack {
        name: "idle",
        what: "2,000 clients connect and say nothing, at 200 connections",
        loss: Loss::Nothing,
        run: idle::run,
    },
    Attack {
        name: "hang-ups",
        what: "clients ask for the widest beam and hang up at once",
        loss: Loss::Nothing,
        run: hang_ups::run,
    },
    Attack {
        name: "flood-closed",
        what: "150 clients ask without a pause",
        loss: Loss::Refusals,
        run: floods::closed,
    },
    Attack {
        name: "flood-open",
        what: "400 requests arrive each second, whatever is answered",
        loss: Loss::Refusals,
        run: floods::open,
    },
    Attack {
        name: "garbage",
        what: "malformed, ambiguous and smuggled requests",
        loss: Loss::Nothing,
        run: garbage::run,
    },
    Attack {
        name: "log-broken",
        what: "the reader of the log goes away",
        loss: Loss::Nothing,
        run: log::broken,
    },
    Attack { name: "log-full", what: "the disk under the log is full", loss: Loss::Nothing, run: log::full },
    Attack {
        name: "log-stuck",
        what: "the reader of the log stops reading",
        loss: Loss::Nothing,
        run: log::stuck,
    },
    Attack {
        name: "truncated-weights",
        what: "a weights file is cut short while it is loaded",
        loss: Loss::Nothing,
        run: truncated::run,
    },
    Attack {
        name: "lying-config",
        what: "config.json is endless, or asks for 2^24 layers",
        loss: Loss::Nothing,
        run: lies::run,
    },
    Attack {
        name: "forged-log-lines",
        what: "a checkpoint and a client put line ends and escapes into names",
        loss: Loss::Nothing,
        run: forgery::run,
    },
    Attack {
        name: "catalog-uploads",
        what: "6 catalogs of 200 MiB are begun and not finished",
        loss: Loss::Nothing,
        run: uploads::run,
    },
    Attack {
        name: "long-prompts",
        what: "8 clients send prompts of 256 KB, which are too long",
        loss: Loss::Nothing,
        run: prompts::run,
    },
    Attack {
        name: "signals",
        what: "HUP, USR1 and QUIT with requests at hand",
        loss: Loss::Nothing,
        run: signals::run,
    },
    Attack {
        name: "few-files",
        what: "256 open files and 400 idle clients",
        loss: Loss::Nothing,
        run: files::run,
    },
    Attack {
        name: "kill-and-restart",
        what: "a catalog and a label change, then the power goes",
        loss: Loss::Nothing,
        run: state::run,
    },
    Attack {
        name: "heavy-neighbour",
        what: "one client of the same server asks for long histories and wide beams",
        loss: Loss::Nothing,
        run: neighbours::heavy,
    },
    Attack {
        name: "greedy-tenant",
        what: "64 clients of another tenant ask without a pause",
        loss: Loss::Nothing,
        run: neighbours::greedy,
    },
];
