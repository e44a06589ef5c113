"""What the trainers of these folders do alike: a step, its learning rate, batches of similar length, a directory at the end.

Needs torch where an optimizer or a step is made, and nothing else, so that the rest can be tested without it.
"""

import math
import os
import random
import shutil
import time


def even(values, count):
    """`count` values, evenly spaced over all of them: files are often ordered."""
    count = min(count, len(values))
    return [values[number * len(values) // count] for number in range(count)]


def by_length(lengths, batch_tokens, rng):
    """Batches of numbers into `lengths`, each of `batch_tokens` at most with its padding, in random order.

    Sequences of similar length share a batch: little padding, and no bias from the sorting beyond a batch."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    made = []
    for start in range(0, len(order), 4096):
        batch = []
        for number in sorted(order[start : start + 4096], key=lambda n: lengths[n]):
            if batch and (len(batch) + 1) * lengths[number] > batch_tokens:
                made.append(batch)
                batch = []
            batch.append(number)
        made.append(batch)
    rng.shuffle(made)
    return made


def cosine(done, floor):
    """A factor of the learning rate: from 1 to `floor` along half a cosine, while `done` goes from 0 to 1."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def adamw(model, rate, weight_decay, betas, **more):
    """The optimizer. Norms and other vectors are not decayed."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, **more)


def take_step(model, optimizer, rate, loss):
    """One step down the gradient of a loss, at this learning rate, the gradient no longer than 1."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class Progress:
    """Says every `every` steps how far training is, with the mean loss since it last spoke."""

    def __init__(self, every):
        self.every, self.start, self.step, self.recent = every, time.time(), 0, []

    def seconds(self):
        return time.time() - self.start

    def tell(self, loss, done):
        """After a step; `done` is the part of the training that is behind, more than 0 and at most 1."""
        self.step += 1
        self.recent.append(loss)
        if self.step % self.every == 0:
            left = self.seconds() / done * (1 - done)
            print(f"step {self.step}  loss {sum(self.recent) / len(self.recent):.4f}  ETA {left / 60:.1f} min", flush=True)
            self.recent = []


def save(out, model, tokenizer, files):
    """A directory that is served as it is. `files`: paths to copy, by their names there."""
    os.makedirs(out, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, source in files.items():
        target = os.path.join(out, name)
        if not (os.path.exists(target) and os.path.samefile(source, target)):
            shutil.copyfile(source, target)


def seeded(seed, threads):
    """Fixes the random numbers of torch, and returns a source of the others."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return random.Random(seed)
