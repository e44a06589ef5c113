//! Rotary frequencies against transformers 5.23 (`ROPE_INIT_FUNCTIONS`, head_dim 16).

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use beamline_model::checkpoint::config::Config;

fn config(rope: &str) -> Result<Config, String> {
    let json = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 4, "head_dim": 16, "vocab_size": 32, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        {rope}}}"#
    );
    Config::parse(&json).map_err(|error| error.to_string())
}

fn check(rope: &str, expected: [f64; 8], scale: f64) {
    let (frequencies, found_scale) = config(rope).unwrap().rope.frequencies(16);
    for (found, expected) in frequencies.iter().zip(expected) {
        assert!((found - expected).abs() <= 2e-6 * expected, "{rope}: {found} against {expected}");
    }
    assert!((found_scale - scale).abs() < 1e-7, "{rope}: {found_scale} against {scale}");
}

#[test]
fn scaled_frequencies_are_those_of_transformers() {
    check(
        r#""rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}"#,
        [
            0.25,
            0.079_056_940_97,
            0.025,
            0.007_905_694_656,
            0.0025,
            0.000_790_569_465_6,
            0.00025,
            7.905_694_656e-5,
        ],
        1.0,
    );
    check(
        r#""rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 512}"#,
        [
            1.0,
            0.193_922_758_102,
            0.027_344_133_704_9,
            0.000_911_583_134_438,
            0.000_176_776_680_746,
            3.428_102_354_5e-5,
            6.647_869_668_1e-6,
            1.289_173_155_8e-6,
        ],
        1.0,
    );
    check(
        r#""rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 2048}"#,
        [
            1.0,
            0.316_227_763_891,
            0.100_000_001_49,
            0.025_693_506_002_4,
            0.006_249_999_627_47,
            0.001_383_496_564_81,
            0.000_250_000_011_87,
            7.905_694_656e-5,
        ],
        1.138_629_436_111_989,
    );
    check(
        r#""rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 8.0, "truncate": false,
            "original_max_position_embeddings": 1024, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.2, "mscale_all_dim": 0.7}"#,
        [
            1.0,
            0.177_827_939_391,
            0.016_548_307_612_5,
            0.000_702_926_656_231,
            0.000_125_000_005_937,
            2.222_849_252_6e-5,
            3.952_846_782_3e-6,
            7.029_266_839_7e-7,
        ],
        1.090_760_845_944_885_6,
    );
}

#[test]
fn what_cannot_be_computed_right_is_refused() {
    for (rope, word) in [
        (r#""rope_scaling": {"rope_type": "longrope", "factor": 2.0}"#, "longrope"),
        (r#""rope_scaling": {"type": "linear"}"#, "factor"),
        (r#""rope_theta": -1.0"#, "rope_theta"),
        (r#""hidden_act": "gelu""#, "gelu"),
        (r#""use_sliding_window": true"#, "sliding"),
        (r#""layer_types": ["sliding_attention"]"#, "sliding"),
        (r#""num_key_value_heads": 3"#, "3 key-value heads"),
        (r#""quantization_config": {"bits": 4}"#, "quantised"),
    ] {
        let error = config(rope).unwrap_err();
        assert!(error.contains(word), "{rope}: {error}");
    }
}
