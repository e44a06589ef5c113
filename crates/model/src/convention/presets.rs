//! Conventions of published model families, by name.
//!
//! Sources: OpenOneRec (Kuaishou-OneRec/OpenOneRec), OneReason (arXiv 2606.06260), OneRec-Think
//! (wangshy31/OneRec-Think), MiniOneRec (AkaliKong/MiniOneRec), LC-Rec (arXiv 2311.09049, RUCAIBox/LC-Rec). Prompts are
//! data that the checkpoints were trained on, so they are kept to the letter. Where a family has many prompts, the
//! preset has the first of its main task; override `prompt_prefix` and `prompt_suffix` for another.

use serde_json::{Value, json};

/// Names of all presets.
pub fn names() -> Vec<&'static str> {
    vec!["openonerec", "onereason", "onerec-think", "minionerec", "lc-rec"]
}

/// The fields of a preset.
pub(super) fn find(name: &str) -> Option<Value> {
    Some(match name {
        "openonerec" => openonerec(),
        "onereason" => onereason(),
        "onerec-think" => onerec_think(),
        "minionerec" => minionerec(),
        "lc-rec" => lc_rec(),
        _ => return None,
    })
}

/// Video recommendation without thinking: the empty think block is part of the prompt.
fn openonerec() -> Value {
    json!({
        "levels": 3,
        "level_token_patterns": ["<s_a_{}>", "<s_b_{}>", "<s_c_{}>"],
        "level_code_counts": [8192, 8192, 8192],
        "item_begin_token": "<|sid_begin|>",
        "item_end_token": "<|sid_end|>",
        "prompt_prefix": "<|im_start|>system\n你是一个智能推荐助手，能够根据用户的浏览历史预测用户可能感兴趣的下一个内容。<|im_end|>\n\
            <|im_start|>user\n根据以下用户浏览记录，请预测用户接下来可能观看的内容：\n",
        "prompt_suffix": "/no_think<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "generation_begin": "<|sid_begin|>",
        "max_history_items": 512
    })
}

/// One begin token per domain and no end token. The prompts of this family are not published with the paper, so
/// there is no text around the history; give `prompt_prefix` and `prompt_suffix`, or send prompts.
fn onereason() -> Value {
    json!({
        "levels": 3,
        "level_token_patterns": ["<s_a_{}>", "<s_b_{}>", "<s_c_{}>"],
        "level_code_counts": [8192, 8192, 8192],
        "item_begin_token": "<|video_begin|>",
        "generation_begin": "<|video_begin|>"
    })
}

/// Begin and end markers are generated with the SID.
fn onerec_think() -> Value {
    json!({
        "levels": 4,
        "level_token_patterns": ["<s_a_{}>", "<s_b_{}>", "<s_c_{}>", "<s_d_{}>"],
        "level_code_counts": [256, 256, 256, 256],
        "item_begin_token": "<|sid_begin|>",
        "item_end_token": "<|sid_end|>",
        "item_separator": "; ",
        "prompt_prefix": "<|im_start|>system\nYou are a professional recommendation expert who needs to recommend the next \
            possible purchase for users based on their purchase history. Please predict the most likely next product \
            that the user will purchase based on the user's historical purchase information.<|im_end|>\n\
            <|im_start|>user\nThe user has purchased the following items: ",
        "prompt_suffix": ";<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
        "lead_tokens": ["<|sid_begin|>"],
        "tail_tokens": ["<|sid_end|>"]
    })
}

/// Plain text without a chat template; a newline and the end token are generated and scored.
fn minionerec() -> Value {
    json!({
        "levels": 3,
        "level_token_patterns": ["<a_{}>", "<b_{}>", "<c_{}>"],
        "level_code_counts": [256, 256, 256],
        "codes_with_tokens": "used",
        "item_separator": ", ",
        "prompt_prefix": "Below is an instruction that describes a task, paired with an input that provides further \
            context. Write a response that appropriately completes the request. \n\n### Instruction:\nCan you predict \
            the next possible item that the user may expect?\n\n### User Input: \nCan you predict the next possible item \
            the user may expect, given the following chronological interaction history: ",
        "prompt_suffix": "\n\n### Response:\n",
        "tail_tokens": ["\n", "<|im_end|>"],
        "max_history_items": 10
    })
}

/// LC-Rec, and LETTER on the same backbone. Decoded with an exact trie here; the authors allow every code of a level.
fn lc_rec() -> Value {
    json!({
        "levels": 4,
        "level_token_patterns": ["<a_{}>", "<b_{}>", "<c_{}>", "<d_{}>"],
        "level_code_counts": [256, 256, 256, 256],
        "codes_with_tokens": "used",
        "item_separator": ", ",
        "prompt_prefix": "Below is an instruction that describes a task. Write a response that appropriately completes \
            the request.\n\n### Instruction:\nThe user has interacted with items ",
        "prompt_suffix": " in chronological order. Can you predict the next possible item that the user may \
            expect?\n\n### Response:",
        "add_special_tokens": true,
        "tail_tokens": ["</s>"],
        "max_history_items": 20
    })
}
