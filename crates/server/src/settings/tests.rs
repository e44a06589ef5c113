//! Tests of precedence, mistakes in the file, and contradictions.

use super::*;

fn file(text: &str) -> (tempfile::TempDir, Flags) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("beamline.toml");
    std::fs::write(&path, text).unwrap();
    (directory, Flags { config: Some(path), ..Flags::default() })
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let (_directory, mut flags) = file(
        "[model]\ncheckpoint = 'a'\nname = 'from-file'\n[engine]\nkv_memory = '64MiB'\nthreads = 3\n\
         [http]\nlisten = '127.0.0.1:9'\nmax_body_bytes = 1000\n[limits]\nmax_beam_width = 40\n",
    );
    flags.model.name = Some("from-flag".into());
    let settings = Settings::resolve(flags, HttpLayer::default()).unwrap();
    assert_eq!(settings.model.name, "from-flag");
    assert_eq!(settings.model.checkpoint().unwrap(), Path::new("a"));
    assert_eq!(settings.engine.kv_memory, Some(ByteSize(64 << 20)));
    assert_eq!((settings.engine.threads, settings.engine.max_queued), (3, 1024));
    assert_eq!(settings.http.listen.port(), 9);
    assert_eq!(settings.http.max_body_bytes, 1000);
    assert_eq!((settings.limits.max_beam_width, settings.limits.default_beam_width), (40, 40));
}

#[test]
fn the_example_has_every_key_at_its_default() {
    let example = include_str!("../../beamline.example.toml");
    let (_directory, flags) = file(example);
    let given = Settings::resolve(flags, HttpLayer::default()).unwrap();
    let default = Settings::resolve(Flags::default(), HttpLayer::default()).unwrap();
    // Values that depend on the machine are comments in the example, as are files.
    assert_eq!(format!("{given:?}"), format!("{default:?}"));
    let layers = [
        format!("{:?}", ModelLayer::default()),
        format!("{:?}", EngineLayer::default()),
        format!("{:?}", LimitsLayer::default()),
        format!("{:?}", HttpLayer::default()),
        format!("{:?}", AdminLayer::default()),
        format!("{:?}", LogLayer::default()),
    ];
    for key in layers.concat().split(['{', ',', '}']).filter_map(|field| field.trim().strip_suffix(": None"))
    {
        assert!(example.contains(&format!("{key} = ")), "{key} is not in the example");
    }
}

#[test]
fn a_disk_needs_a_directory_and_a_size() {
    let resolve = |text: &str| {
        let (_directory, flags) = file(text);
        Settings::resolve(flags, HttpLayer::default()).map(|settings| settings.kv_disk)
    };
    assert_eq!(resolve("").unwrap(), None);
    let given = resolve("[engine]\nkv_disk = 'kv'\nkv_disk_size = '2GiB'\nkv_disk_wait_ms = 5").unwrap();
    let expected = DiskSettings {
        directory: "kv".into(),
        size: ByteSize(2 << 30),
        ttl: Some(Duration::from_secs(7 * 24 * 3600)),
        wait: Some(Duration::from_millis(5)),
        count_only: false,
    };
    assert_eq!(given, Some(expected));
    for (half, missing) in [("kv_disk = 'kv'", "kv-disk-size"), ("kv_disk_size = 1", "kv-disk too")] {
        let error = resolve(&format!("[engine]\n{half}")).unwrap_err().to_string();
        assert!(error.contains(missing), "{error}");
    }
}

#[test]
fn a_graphics_processor_has_one_format_of_weights_and_one_of_keys_and_values() {
    let resolve = |text: &str| {
        let (_directory, flags) = file(text);
        Settings::resolve(flags, HttpLayer::default())
    };
    let settings = resolve("[engine]\ndevice = 'cuda:1'").unwrap();
    assert_eq!(
        (settings.engine.device, settings.engine.weight_format, settings.engine.kv_format),
        (DeviceChoice::Cuda(1), WeightFormat::Bf16, KvFormat::Bf16)
    );
    assert!(resolve("[engine]\ndevice = 'cuda'\nkv_format = 'bf16'").is_ok());
    let error = resolve("[engine]\ndevice = 'cuda'\nkv_format = 'f32'").unwrap_err();
    assert!(error.to_string().contains("kv-format is f32, but device cuda:0 has bf16 only"), "{error}");
    assert_eq!(resolve("[engine]\nkv_format = 'bf16'").unwrap().engine.kv_format, KvFormat::Bf16);
    assert_eq!(resolve("").unwrap().engine.kv_format, KvFormat::F32);
    let error = resolve("[engine]\ndevice = 'cuda'\nweight_format = 'q8_0'").unwrap_err();
    assert!(error.to_string().contains("weight-format is q8_0, but device cuda:0 has bf16 only"), "{error}");
    let random = "[model]\nrandom_weights = 'shape/config.json'\n";
    let settings = resolve(&format!("{random}[engine]\ndevice = 'cuda'")).unwrap();
    assert_eq!(settings.model.checkpoint().unwrap(), Path::new("shape"));
    assert!(resolve(random).unwrap_err().to_string().contains("they need device cuda"));
    let both = format!("{random}checkpoint = 'a'\n[engine]\ndevice = 'cuda'");
    assert!(resolve(&both).unwrap_err().to_string().contains("give one of them"));
    assert!(resolve("[engine]\ndevice = 'gpu'").unwrap_err().to_string().contains("not a device"));
}

#[test]
fn what_the_file_misspells_is_an_error() {
    for text in ["[model]\ncheckpiont = 'a'", "[modle]\n", "threads = 2", "[engine]\nkv_memory = 'lots'"] {
        let (_directory, flags) = file(text);
        let error = Settings::resolve(flags, HttpLayer::default()).unwrap_err();
        assert!(matches!(error, SettingsError::Parse { .. }), "{text}: {error}");
    }
    let flags = Flags { config: Some("/nowhere/beamline.toml".into()), ..Flags::default() };
    assert!(matches!(Settings::resolve(flags, HttpLayer::default()), Err(SettingsError::Read { .. })));
}

#[test]
fn an_error_in_the_file_is_plain_and_says_what_was_meant() {
    let message = |text: &str| {
        let (_directory, flags) = file(text);
        Settings::resolve(flags, HttpLayer::default()).unwrap_err().to_string()
    };
    let misspelt = message("[model]\ncheckpiont = 'a'");
    assert!(misspelt.contains("line 2") && misspelt.contains("did you mean `checkpoint`?"), "{misspelt}");
    let wrong = message("[engine]\nthreads = 'two'");
    assert!(wrong.contains("expected a whole number") && !wrong.contains("usize"), "{wrong}");
    assert!(message("[http]\nlisten = 'shop'").contains("write 127.0.0.1:8080"));
}

#[test]
fn contradictions_are_errors() {
    let limits = |text: &str| {
        let (_directory, flags) = file(&format!("[limits]\n{text}"));
        Settings::resolve(flags, HttpLayer::default()).unwrap_err().to_string()
    };
    assert!(limits("max_beam_width = 0").contains("max-beam-width must be at least 1"));
    assert!(limits("max_beam_width = 8\ndefault_beam_width = 9").contains("more than max-beam-width (8)"));
    assert!(limits("default_timeout_ms = 70000").contains("more than max-timeout-ms"));
}

#[test]
fn counts_beyond_all_reason_name_their_flag() {
    for name in ["max_queued", "max_running"] {
        let (_directory, flags) = file(&format!("[engine]\n{name} = 9223372036854775807"));
        let error = Settings::resolve(flags, HttpLayer::default()).unwrap_err().to_string();
        assert!(error.contains(&name.replace('_', "-")) && error.contains("at most 1048576"), "{error}");
    }
    let (_directory, flags) = file("[http]\nlisten = '127.0.0.1:9'\nhealth_listen = '127.0.0.1:9'");
    let error = Settings::resolve(flags, HttpLayer::default()).unwrap_err().to_string();
    assert!(error.contains("another port"), "{error}");
}
