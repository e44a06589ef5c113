"""Exact beam search of an encoder-decoder over a catalog, the plain way: at every level the decoder reads all of a beam's path.

The trie and the choice of beams are those of recipe/beam.py, and so are the arguments, so that its `recall` takes this search.
"""

import torch

import beam
from layout import END, PAD


def encoder_input(histories, paths):
    """Token ids and mask [users, longest] of histories of item numbers: the items' tokens, </s>, and padding on the right."""
    prompts = [[token for item in history for token in paths[item]] + [END] for history in histories]
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [PAD] * (longest - len(prompt)) for prompt in prompts])
    return ids, torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])


@torch.no_grad()
def search(model, trie, prefix, paths, histories, beam_width=50, normalization="full_vocab", exclude_history=False):
    """Leaves [users, beams] and their scores, best first. `prefix` is there because a decoder's search has it; it is empty."""
    assert not prefix
    ids, mask = encoder_input(histories, paths)
    states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    users = len(histories)
    node, score = torch.zeros(users, 1, dtype=torch.long), torch.zeros(users, 1)
    written = torch.full((users, 1, 1), model.config.decoder_start_token_id)
    for level in range(trie.levels):
        beams = written.shape[1]
        logits = model(
            encoder_outputs=(states.repeat_interleave(beams, 0),),
            attention_mask=mask.repeat_interleave(beams, 0),
            decoder_input_ids=written.flatten(0, 1),
            use_cache=False,
        ).logits[:, -1]
        children, total = beam.children_of(trie, level, node, score, logits.view(users, beams, -1), normalization)
        if exclude_history and level == trie.levels - 1:
            beam.forbid(trie, histories, children, total)
        parent, node, score = beam.keep(children, total, beam_width)
        older = written.gather(1, parent[..., None].expand(-1, -1, level + 1))
        written = torch.cat([older, trie.token[level][node][..., None]], 2)
    return node, score
