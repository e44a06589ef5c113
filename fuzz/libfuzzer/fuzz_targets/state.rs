#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| beamline_fuzz::run("state", input));
