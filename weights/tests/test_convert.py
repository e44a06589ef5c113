"""The converters of HSTU checkpoints: what they write computes what the reference computed, and what they cannot know they refuse.
Skipped where torch, numpy or safetensors are missing. Run: python3 -m unittest discover -s weights/tests"""

import contextlib
import copy
import importlib.util
import io
import json
import os
import pickle
import sys
import tempfile
import unittest
import warnings

WEIGHTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIXTURES = os.path.join(os.path.dirname(WEIGHTS), "fixtures")
sys.path.insert(0, os.path.join(WEIGHTS, "convert"))

TORCH = all(importlib.util.find_spec(name) for name in ("torch", "numpy", "safetensors"))
needs_torch = unittest.skipUnless(TORCH, "needs torch, numpy and safetensors")
if TORCH:
    import check
    import checkpoint
    import dlrm
    import dynamicemb
    import numpy as np
    import nvidia
    import research
    import sharded
    import torch
    from safetensors.torch import load_file, save_file
else:
    print("test_convert.py: torch, numpy or safetensors missing, the converters are NOT tested", file=sys.stderr)


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


class Folder(unittest.TestCase):
    """A folder per test; tools are run quietly."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = temporary.name

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def json(self, *names):
        with open(self.path(*names), encoding="utf-8") as file:
            return json.load(file)

    def lines(self, *names):
        with open(self.path(*names), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write_json(self, value, *names):
        with open(self.path(*names), "w", encoding="utf-8") as file:
            json.dump(value, file)
        return self.path(*names)

    def write_text(self, text, *names):
        with open(self.path(*names), "w", encoding="utf-8") as file:
            file.write(text)
        return self.path(*names)

    def quietly(self, run, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            result = run(*arguments)
        self.said = out.getvalue()
        return result

    def refused(self, message, run, *arguments):
        with self.assertRaises(SystemExit) as raised:
            self.quietly(run, *arguments)
        self.assertIn(message, str(raised.exception))

    def agrees(self, directory, against, tolerance=None):
        return self.quietly(check.run, self.path(directory), against, tolerance)

    def each_wrong(self, against, changes, directory="out"):
        """Every one of these changes to config.json must show."""
        config = self.json(directory, "config.json")
        for path, value in changes.items():
            wrong = copy.deepcopy(config)
            *parents, last = path.split(".")
            place = wrong
            for name in parents:
                place = place[name]
            self.assertNotEqual(place[last], value, path)
            if isinstance(value, dict):
                place[last] = {**place[last], **value}
            else:
                place[last] = value
            self.write_json(wrong, directory, "config.json")
            with self.subTest(path):
                self.assertFalse(self.agrees(directory, against))
        self.write_json(config, directory, "config.json")


def state_of(fixture):
    tensors = load_file(os.path.join(FIXTURES, fixture))
    return {name[len("state.") :]: tensor for name, tensor in tensors.items() if name.startswith("state.")}


@needs_torch
class ResearchTest(Folder):
    double = os.path.join(FIXTURES, "hstu-research", "fp64.safetensors")
    single = os.path.join(FIXTURES, "hstu-research", "fp32.safetensors")
    options = ("--heads", "2", "--max-sequence-length", "12", "--activation", "silu", "--normalization", "l2")

    def pickled(self, change=None, fixture="hstu-research/fp32.safetensors"):
        state = state_of(fixture)
        if change:
            change(state)
        path = self.path("checkpoint.pt")
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.98)}]}
        state = {"module." + name: tensor for name, tensor in state.items()}
        torch.save({"epoch": 7, "model_state_dict": state, "optimizer_state_dict": optimizer}, path)
        return path

    def convert(self, *more, options=options, change=None):
        self.quietly(research.main, [self.pickled(change), "--out", self.path("out"), *options, *more])

    def test_round_trip(self):
        self.convert("--gr-output-length", "3", "--key-dim", "4", "--value-dim", "5", "--check", self.double)
        self.assertEqual(
            self.json("out", "config.json"),
            {
                "model_type": "hstu",
                "hstu_variant": "research",
                "stack": {
                    **{"model_dim": 10, "layers": 3, "heads": 2, "key_dim": 4, "value_dim": 5},
                    "input_norm": {"affine": False, "eps": 1e-6},
                    **{"uvqk_bias": False, "uvqk_layout": "in_out", "silu": "uvqk", "logit_scale": 1.0, "attention_divisor": 16},
                    "relative_bias": {"positions": 16, "time_buckets": 128, "time_divisor": 0.301},
                    "mask": {"contextual_len": 0, "max_attention_len": 0, "min_full_attention_len": 0},
                    "output_norm": {"kind": "layer", "affine": False, "eps": 1e-6},
                    **{"output_parts": "gated", "output_bias": True, "output_layout": "out_in", "residual": True},
                },
                "input": {
                    **{"num_items": 37, "padding_id": 0, "max_sequence_length": 12},
                    "position": {"direction": "forward", "rows": 16, "scale": "sqrt_model_dim"},
                    "actions": None,
                },
                "output": {"normalization": {"kind": "l2", "eps": 1e-6}, "head": {"kind": "items", "eps": 1e-6}},
            },
        )
        written, state = load_file(self.path("out", "model.safetensors")), state_of("hstu-research/fp32.safetensors")
        state.pop("_attn_mask")
        self.assertEqual(written.keys(), state.keys())
        self.assertTrue(all(torch.equal(written[name], state[name]) for name in state))
        self.assertTrue(self.agrees("out", self.double))
        for name in ("layer2.jagged", "layer2.rel_attn_bias", "seq_embeddings", "scores", "topk_ids_filtered"):
            self.assertIn(f"out.{name}: within", self.said)
        self.assertIn("not compared: out.scores_div_temperature", self.said)
        self.assertTrue(self.agrees("out", self.single))

    def test_several_stages(self):
        path = self.pickled(fixture="hstu-research-append/fp32.safetensors")
        options = ("--heads", "2", "--max-sequence-length", "24", "--gr-output-length", "10", "--activation", "silu", "--normalization", "l2")
        self.quietly(research.main, [path, "--out", self.path("out"), *options])
        self.assertTrue(self.agrees("out", os.path.join(FIXTURES, "hstu-research-append", "fp64.safetensors")))
        self.assertIn("out.c.layer1.jagged: within", self.said)

    def test_a_wrong_constant_shows(self):
        self.convert()
        self.each_wrong(
            self.double,
            {
                "stack": {"heads": 1, "key_dim": 8, "value_dim": 10},
                "stack.attention_divisor": 12,
                "stack.logit_scale": "inverse_sqrt_key_dim",
                "stack.silu": "u",
                "stack.input_norm.eps": 1e-5,
                "stack.output_norm.eps": 1e-5,
                "stack.relative_bias": None,
                "stack.relative_bias.time_buckets": 20,
                "stack.residual": False,
                "input.position.scale": 1.0,
                "input.padding_id": 5,
                "output.normalization": {"kind": "layer_norm"},
                "output.head.eps": 10.0,
            },
        )

    def test_a_wrong_tensor_shows(self):
        def swap(state):
            state["_hstu._attention_layers.1._o.weight"] = state["_hstu._attention_layers.1._o.weight"].T.contiguous()

        self.convert(change=swap)
        self.assertFalse(self.agrees("out", self.double))

    def test_check_decides_the_exit_status(self):
        with self.assertRaises(SystemExit) as raised:
            self.convert("--check", self.double, options=self.options[:-1] + ("layer_norm",))
        self.assertEqual(raised.exception.code, 1)
        self.quietly(check.main, [self.path("out"), "--against", self.double, "--tolerance", "100"])
        with self.assertRaises(SystemExit):
            self.quietly(check.main, [self.path("out"), "--against", self.double])
        save_file({"in.unrelated": torch.zeros(1)}, self.path("nothing.safetensors"))
        self.assertFalse(self.agrees("out", self.path("nothing.safetensors")), "nothing compared is no agreement")

    def test_contradictions_are_refused(self):
        def run(*more, options=self.options, change=None):
            research.main([self.pickled(change), "--out", self.path("out"), *options, *more])

        heads = ("--heads", "3", *self.options[2:])
        length = ("--heads", "2", "--max-sequence-length", "16", *self.options[4:])
        self.refused("not 3 equal parts", lambda: run(options=heads))
        self.refused("16 positions", lambda: run(options=length))
        self.refused("is not the checkpoint's 16 positions", run, "--gr-output-length", "10")
        self.refused("the checkpoint has 4", run, "--key-dim", "5")
        self.refused("not 3 equal parts", run, "--concat-ua")
        mask = lambda state: state["_attn_mask"].fill_(True)  # noqa: E731
        self.refused("_attn_mask does not hide", lambda: run(change=mask))
        small = lambda state: state.update(_attn_mask=state["_attn_mask"][:15, :15].contiguous())  # noqa: E731
        self.refused("_attn_mask has shape [15, 15], expected [16, 16]", lambda: run(change=small))
        bias = lambda state: state.update({"_hstu._attention_layers.1._rel_attn_bias._pos_w": torch.zeros(29)})  # noqa: E731
        self.refused("_pos_w has shape [29], expected [31]", lambda: run(change=bias))
        other = lambda state: state.update(_ndp_module=torch.zeros(2))  # noqa: E731
        self.refused("does not know: _ndp_module", lambda: run(change=other))
        infinite = lambda state: state["_hstu._attention_layers.0._uvqk"].fill_(float("inf"))  # noqa: E731
        self.refused("NaN or infinity", lambda: run(change=infinite))
        self.assertFalse(os.path.exists(self.path("out", "config.json")), "a conversion that failed does not load")
        self.write_text("", "out", "something")
        self.refused("is not empty", run)
        torch.save([torch.zeros(1)], self.path("list.pt"))
        self.refused("holds no dictionary", research.main, [self.path("list.pt"), "--out", self.path("out"), *self.options])

    def test_catalog(self):
        self.convert("--catalog")
        items = self.lines("out", "catalog.jsonl")
        self.assertEqual((len(items), items[0], items[-1]), (37, {"item_id": "1", "sid": [1]}, {"item_id": "37", "sid": [37]}))
        names = self.write_text('9\tshoe\n{"number": 3, "item_id": "hat", "tags": ["new"]}\n38\tgone\n', "names")
        rows = {row: row for row in range(1, 38)}
        self.quietly(checkpoint.write_catalog, self.path("out"), rows, names)
        self.assertEqual(self.lines("out", "catalog.jsonl"), [{"item_id": "hat", "sid": [3], "tags": ["new"]}, {"item_id": "shoe", "sid": [9]}])
        self.assertIn("1 items", self.said)
        self.refused("there twice", checkpoint.write_catalog, self.path("out"), rows, self.write_text("3\tx\n4\tx\n", "names"))
        self.refused("there twice", checkpoint.write_catalog, self.path("out"), rows, self.write_text("3\tx\n3\ty\n", "names"))

    def test_a_pickle_that_runs_something_is_refused(self):
        path, left = self.path("evil.pt"), self.path("left-behind")
        torch.save({"epoch": 1, "model_state_dict": state_of("hstu-research/fp32.safetensors"), "more": Touch(left)}, path)
        self.refused("can run any program", research.main, [path, "--out", self.path("out"), *self.options])
        self.assertFalse(os.path.exists(left))
        with open(path, "wb") as file:
            pickle.dump(Touch(left), file, protocol=2)
        self.refused("can run any program", research.main, [path, "--out", self.path("out"), *self.options])
        self.assertFalse(os.path.exists(left))

    def test_shards(self):
        config, tensors = {"x": 1}, {f"t{number}": torch.full((4, 4), float(number)) for number in range(5)}
        checkpoint.write(self.path("sharded"), config, tensors, shard_bytes=128)
        index = self.json("sharded", "model.safetensors.index.json")["weight_map"]
        self.assertEqual(len(set(index.values())), 3)
        for name, shard in index.items():
            self.assertTrue(torch.equal(load_file(self.path("sharded", shard))[name], tensors[name]))


CONSTANTS = {
    "heads": 2,
    "group_norm": False,
    "attention_divisor": 18,
    "time_clamp": "model_dim",
    "features": [{"name": "video_id", "table": "video_id"}, {"name": "owner_id", "table": "owner_id"}],
    "contextual": [
        {"name": "user_id", "table": "user_id", "slots": 1, "min_tokens": 5},
        {"name": "country", "table": "country", "slots": 2, "min_tokens": 0},
    ],
    "item_tower_features": ["video_id", "owner_id"],
    "postprocessor": "timestamp_layer_norm",
    "tasks": [{"name": "click", "kind": "binary"}, {"name": "like", "kind": "binary"}, {"name": "watch", "kind": "regression"}],
    "unknown_ids": {"video_id": "refuse", "owner_id": "clamp", "user_id": "refuse", "country": "refuse"},
    "max_history": 100,
    "max_candidates": 100,
}


@needs_torch
class DlrmTest(Folder):
    fixture = os.path.join(FIXTURES, "hstu-stu", "dlrm_hstu_fp32.safetensors")

    def saved(self, half=False):
        from torch.distributed import checkpoint as distributed

        state, home = state_of("hstu-stu/dlrm_hstu_fp32.safetensors"), self.path("saved")
        sparse = {name: tensor for name, tensor in state.items() if "embedding_collection" in name}
        dense = {name: tensor for name, tensor in state.items() if name not in sparse}
        if half:
            sparse = {name: tensor.half() for name, tensor in sparse.items()}
        os.mkdir(home)
        more = {"optimizer_dict": {}, "class_metrics": {}, "reg_metrics": {}, "global_step": 7, "sparse_tensor_keys": set(sparse)}
        torch.save({"dense_dict": dense, **more}, os.path.join(home, "non_sparse.ckpt"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distributed.save({"sparse_dict": sparse}, checkpoint_id=os.path.join(home, "sparse"), no_dist=True)
        return home

    def convert(self, source, constants=CONSTANTS, out="out"):
        self.quietly(dlrm.main, [source, "--constants", self.write_json(constants, "constants.json"), "--out", self.path(out), "--catalog"])

    def test_round_trip(self):
        self.convert(self.saved())
        config = self.json("out", "config.json")
        self.assertEqual((config["stack"]["key_dim"], config["stack"]["value_dim"], config["stack"]["layers"]), (5, 6, 2))
        self.assertEqual(config["input"]["action_weights"], [1, 2, 4])
        self.assertEqual(self.lines("out", "catalog.jsonl")[49:], [{"item_id": "49", "sid": [49]}])
        self.assertEqual(config["output"]["postprocessor"]["periods"], [[3600, 24], [86400, 7]])
        self.assertEqual(config["input"]["tables"][1], {"name": "owner_id", "rows": 20, "unknown_ids": "clamp"})
        self.assertFalse([name for name in load_file(self.path("out", "model.safetensors")) if "_units" in name or "_combined" in name])
        self.assertTrue(self.agrees("out", self.fixture))
        for name in ("preprocessor.embeddings", "position", "stu", "user_embeddings", "item_embeddings", "preds"):
            self.assertIn(f"out.{name}: within", self.said)
        changes = {
            "stack": {"heads": 1, "key_dim": 10, "value_dim": 12},
            "stack.attention_divisor": 72,
            "stack.silu": "uvqk",
            "stack.output_parts": "concat_normed",
            "input.time.clamp": "rows",
            "input.position.scale": 1.0,
            "input.action_weights": [1, 4, 2],
            "input.contextual": [{**CONSTANTS["contextual"][0], "min_tokens": 11}, CONSTANTS["contextual"][1]],
            "output.postprocessor": {"cycle": 6.283185307179586},
            "output.tasks": [{"name": "click", "kind": "binary"}] * 3,
        }
        self.each_wrong(self.fixture, changes)

    def test_the_trained_time_clamp(self):
        trained = load_file(os.path.join(FIXTURES, "hstu-stu", "dlrm_hstu_clamp_rows_fp32.safetensors"))
        inputs = {name: tensor for name, tensor in load_file(self.fixture).items() if name.startswith("in.")}
        save_file({**inputs, **{name: tensor for name, tensor in trained.items() if name.startswith("out.")}}, self.path("trained.safetensors"))
        state = state_of("hstu-stu/dlrm_hstu_fp32.safetensors")
        save_file(state, self.path("state.safetensors"))
        self.convert(self.path("state.safetensors"), {**CONSTANTS, "time_clamp": "rows"})
        self.assertTrue(self.agrees("out", self.path("trained.safetensors")))
        self.assertIn("out.preds: within", self.said)

    def test_half_precision_tables_stay(self):
        self.convert(self.saved(half=True))
        types = {name: tensor.dtype for name, tensor in load_file(self.path("out", "model.safetensors")).items()}
        self.assertEqual({dtype for name, dtype in types.items() if "embedding_collection" in name}, {torch.float16})
        self.assertEqual({dtype for name, dtype in types.items() if "embedding_collection" not in name}, {torch.float32})

    def test_what_is_missing_or_contradicts_is_refused(self):
        save_file(state_of("hstu-stu/dlrm_hstu_fp32.safetensors"), self.path("state.safetensors"))
        run = lambda **changes: self.convert(self.path("state.safetensors"), {**CONSTANTS, **changes})  # noqa: E731
        without = {name: value for name, value in CONSTANTS.items() if name != "attention_divisor"}
        self.refused("missing attention_divisor", self.convert, self.path("state.safetensors"), without)
        self.refused("unknown divisor", lambda: run(divisor=1))
        self.refused("not 3 equal parts", lambda: run(heads=3))
        self.refused("_output_norm_weight has shape [12], expected [2]", lambda: run(group_norm=True))
        self.refused("the checkpoint has [1, 2, 4]", lambda: run(action_weights=[1, 2, 8]))
        self.refused("_prediction_module.2.weight has shape [3, 512], expected [2, 512]", lambda: run(tasks=CONSTANTS["tasks"][:2]))
        self.refused("does not know", lambda: run(postprocessor="layer_norm"))

    def test_a_description_that_runs_something_is_refused(self):
        home, left = self.saved(), self.path("left-behind")
        with open(os.path.join(home, "sparse", ".metadata"), "wb") as file:
            pickle.dump(Touch(left), file)
        self.refused("has no place in it", self.convert, home)
        self.assertFalse(os.path.exists(left))
        self.refused("has no place in it", sharded.load_tensors, os.path.join(home, "sparse"))

    def test_masks_windows_and_group_norms_of_the_check(self):
        cases = {"plain": (0, 0), "ctx": (3, 0), "window": (0, 4), "groupnorm": (2, 0)}
        for case, (contextual, window) in cases.items():
            with self.subTest(case):
                fixture = f"hstu-stu/stu_{case}_fp32.safetensors"
                state = {"_hstu_transducer._stu_module." + name: tensor for name, tensor in state_of(fixture).items()}
                most = int(load_file(os.path.join(FIXTURES, fixture))["in.max_seq_len"])
                constants = {**CONSTANTS, "group_norm": case == "groupnorm", "attention_divisor": most}
                held = checkpoint.State(state)
                stack = dlrm.stack_of(held, constants)
                stack["mask"] = {"contextual_len": contextual, "max_attention_len": window, "min_full_attention_len": 0}
                config = {"hstu_variant": "dlrm", "stack": stack, "input": {}, "output": {}}
                checkpoint.write(self.path(case), config, held.finish())
                self.assertTrue(self.agrees(case, os.path.join(FIXTURES, fixture)))
                self.assertIn("out.layer2: within", self.said)


NVIDIA = {
    "heads": 4,
    "attention_divisor": 50,
    "layernorm_epsilon": 1e-5,
    "residual": True,
    "item_table": "video",
    "action_table": "act",
    "contextual": [{"name": "user_id", "table": "user", "slots": 1}],
    "unknown_ids": {"video": "refuse", "act": "refuse", "user": "clamp"},
    "activation": "relu",
    "prediction": "sigmoid",
    "tasks": ["click", "like", "share"],
    "max_history": 40,
    "max_candidates": 20,
}
WIDTH, HEADS, DIM = 12, 4, 3
KEYS = [70, 3, 1 << 40, 11, 5, 42, 8]


@needs_torch
class NvidiaTest(Folder):
    def setUp(self):
        super().setUp()
        random = torch.Generator().manual_seed(7)
        self.random = lambda *shape: torch.randn(*shape, generator=random) * 0.4
        layer = "_hstu_block._attention_layers.{}."
        tables = "_embedding_collection._data_parallel_embedding_collection.embeddings.{}.weight"
        self.outside = {
            nvidia.POSITIONS: self.random(9, WIDTH),
            tables.format("act"): self.random(6, WIDTH),
            tables.format("user"): self.random(5, WIDTH),
            "_mlp._mlp.0.weight": self.random(10, WIDTH),
            "_mlp._mlp.0.bias": self.random(10),
            "_mlp._mlp.2.weight": self.random(3, 10),
            "_mlp._mlp.2.bias": self.random(3),
        }
        self.items = {tables.format("video"): self.random(len(KEYS), WIDTH)}
        self.native = {}
        for number in range(2):
            prefix = layer.format(number)
            self.native |= {
                prefix + "_linear_uvqk.weight": self.random(4 * HEADS * DIM, WIDTH),
                prefix + "_linear_uvqk.bias": self.random(4 * HEADS * DIM),
                prefix + "_linear_proj.weight": self.random(WIDTH, HEADS * DIM),
                prefix + "_input_layernorm_weight": 1 + self.random(WIDTH),
                prefix + "_input_layernorm_bias": self.random(WIDTH),
                prefix + "_output_ln_dropout_mul.weight": 1 + self.random(HEADS * DIM),
                prefix + "_output_ln_dropout_mul.bias": self.random(HEADS * DIM),
            }

    def save(self, state, name="model.0.pth"):
        state = {"module." + name: tensor for name, tensor in state.items()}
        torch.save({"model_state_dict": state, "optimizer_state_dict": {}}, self.path(name))
        return self.path(name)

    def convert(self, files, layout, *more, out="out"):
        constants = self.write_json(NVIDIA, "constants.json")
        self.quietly(nvidia.main, [*files, "--layout", layout, "--constants", constants, "--out", self.path(out), *more])

    def fused(self):
        """The native layers in the fused layout, one number at a time."""
        fused = {}
        for name, tensor in self.native.items():
            if "_linear_uvqk" in name:
                columns = torch.zeros_like(tensor)
                for head in range(HEADS):
                    for part in range(4):
                        for j in range(DIM):
                            columns[part * HEADS * DIM + head * DIM + j] = tensor[head * 4 * DIM + part * DIM + j]
                fused[name.replace("uvqk.", "uvqk_")] = columns.T.contiguous() if tensor.dim() == 2 else columns
            elif "_linear_proj" in name:
                fused[name.replace("proj.", "proj_")] = tensor.T.contiguous()
            else:
                fused[name.replace("_output_ln_dropout_mul.", "_output_layernorm_")] = tensor
        return fused

    def ranks(self):
        """The native layers as two tensor-parallel ranks hold them."""
        ranks = []
        for rank in range(2):
            state = {**self.outside, **self.items}
            for name, tensor in self.native.items():
                along = 1 if "_linear_proj" in name else 0
                state[name] = tensor if "_input_layernorm" in name else tensor.chunk(2, along)[rank].contiguous()
            ranks.append(self.save(state, f"model.{rank}.pth"))
        return ranks

    def reference(self):
        """Stated inputs and outputs: the native layer as it is written in NVIDIA's code, number by number, in double precision."""
        values = {name: tensor.double().numpy() for name, tensor in {**self.native, **self.outside, **self.items}.items()}
        norm = lambda x, w, b: (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w + b  # noqa: E731
        table = lambda name: values[f"_embedding_collection._data_parallel_embedding_collection.embeddings.{name}.weight"]  # noqa: E731
        items, actions, candidates, users = [[0, 3, 6], [5]], [[1, 1, 4], [0]], [[2, 3], [4, 1, 0]], [[4], []]
        layers, logits = [[], []], []
        for user in range(2):
            rows = [table("user")[id] for id in users[user]]
            for item, action in zip(items[user], actions[user]):
                rows += [table("video")[item], table("act")[action]]
            context = len(rows)
            rows += [table("video")[id] for id in candidates[user]]
            x = np.array([row * WIDTH**0.5 + values[nvidia.POSITIONS][min(i, context, 8)] for i, row in enumerate(rows)])
            for number in range(2):
                of = lambda name: values[f"_hstu_block._attention_layers.{number}.{name}"]  # noqa: B023, E731
                h = np.array([norm(row, of("_input_layernorm_weight"), of("_input_layernorm_bias")) for row in x])
                h = h @ of("_linear_uvqk.weight").T + of("_linear_uvqk.bias")
                h = (h / (1 + np.exp(-h))).reshape(len(x), HEADS, 4, DIM)
                a = np.zeros((len(x), HEADS * DIM))
                for i in range(len(x)):
                    for j in range(i + 1):
                        if j < context or i == j:
                            for head in range(HEADS):
                                s = h[i, head, 2] @ h[j, head, 3] / DIM**0.5
                                a[i, head * DIM : (head + 1) * DIM] += s / (1 + np.exp(-s)) / 50 * h[j, head, 1]
                g = np.array([norm(row, of("_output_ln_dropout_mul.weight"), of("_output_ln_dropout_mul.bias")) for row in a])
                x = x + (h[:, :, 0].reshape(len(x), -1) * g) @ of("_linear_proj.weight").T
                layers[number].append(x)
            y = x[context:] / np.linalg.norm(x[context:], axis=1, keepdims=True)
            y = np.maximum(y @ values["_mlp._mlp.0.weight"].T + values["_mlp._mlp.0.bias"], 0)
            logits.append(y @ values["_mlp._mlp.2.weight"].T + values["_mlp._mlp.2.bias"])
        logits = np.concatenate(logits)
        flat = lambda lists: torch.tensor(sum(lists, []))  # noqa: E731
        stated = {
            "in.num_events": torch.tensor([3, 1]),
            "in.num_candidates": torch.tensor([2, 3]),
            "in.items": flat(items),
            "in.actions": flat(actions),
            "in.candidates": flat(candidates),
            "in.contextual.user_id": flat(users),
            "in.contextual_len.user_id": torch.tensor([1, 0]),
            "out.logits": torch.from_numpy(logits),
            "out.preds": torch.from_numpy(1 / (1 + np.exp(-logits))),
        }
        stated |= {f"out.layer{number}": torch.from_numpy(np.concatenate(rows)) for number, rows in enumerate(layers)}
        save_file(stated, self.path("stated.safetensors"))
        return self.path("stated.safetensors")

    def test_the_permutation(self):
        for heads, dim in ((1, 4), (3, 2), (4, 5)):
            order = nvidia.fused_order(heads, dim).tolist()
            for part in range(4):
                for head in range(heads):
                    for j in range(dim):
                        self.assertEqual(order[part * heads * dim + head * dim + j], head * 4 * dim + part * dim + j)

    def test_native_layers_of_one_rank_and_of_two(self):
        against = self.reference()
        whole = self.save({**self.native, **self.outside, **self.items, "_hstu_block._attention_layers.0._linear_uvqk._extra_state": torch.zeros(1)})
        self.convert([whole], "native", out="one")
        self.convert(self.ranks(), "native", out="two")
        one, two = (load_file(self.path(out, "model.safetensors")) for out in ("one", "two"))
        expected = {**self.fused(), **self.outside, **self.items}
        for written in (one, two):
            self.assertEqual(written.keys(), expected.keys())
            self.assertTrue(all(torch.equal(written[name], expected[name]) for name in expected))
        self.assertTrue(self.agrees("two", against))
        for name in ("layer0", "layer1", "logits", "preds"):
            self.assertIn(f"out.{name}: within", self.said)
        self.each_wrong(
            against,
            {
                "stack": {"heads": 2, "key_dim": 6, "value_dim": 6},
                "stack.attention_divisor": 60,
                "stack.logit_scale": 1.0,
                "stack.residual": False,
                "stack.output_norm.eps": 1e-6,
                "input.position.scale": 1.0,
                "output.activation": "gelu",
                "output.prediction": "softmax",
            },
            directory="two",
        )

    def test_fused_and_inference_layers(self):
        against, fused = self.reference(), self.fused()
        self.convert([self.save({**fused, **self.outside, **self.items})], "fused", out="fused")
        self.assertTrue(self.agrees("fused", against))
        inference = {name: tensor for name, tensor in fused.items() if "_linear" not in name}
        for name, tensor in fused.items():
            if "_linear" in name:
                inference[name.replace("uvqk_", "uvqk.").replace("proj_", "proj.")] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
        file = self.save({**inference, **self.outside, **self.items})
        self.convert([file], "inference", out="inference")
        self.assertEqual(self.json("inference", "config.json")["stack"]["uvqk_layout"], "out_in")
        self.assertTrue(self.agrees("inference", against))
        # The names fit `native` too, the order does not: it is the check that notices.
        self.convert([file], "native", out="mistaken")
        self.assertFalse(self.agrees("mistaken", against))
        self.refused("not --layout fused", self.convert, [file], "fused")

    def test_ranks_that_do_not_belong_together_are_refused(self):
        ranks = self.ranks()
        self.refused("only --layout native", self.convert, ranks, "fused")
        self.outside["_mlp._mlp.2.bias"] = torch.zeros(3)
        other = self.save({**self.native, **self.outside, **self.items}, "other.pth")
        self.refused("differs between the files", self.convert, [ranks[0], other], "native")

    def dump(self, keys, values, rank, world):
        home = self.path("dynamicemb_module", "collection")
        os.makedirs(home, exist_ok=True)
        np.array(keys, dtype="<i8").tofile(os.path.join(home, f"video_emb_keys.rank_{rank}.world_size_{world}"))
        np.array(values, dtype="<f4").tofile(os.path.join(home, f"video_emb_values.rank_{rank}.world_size_{world}"))

    def test_dynamic_embeddings(self):
        rows = next(iter(self.items.values())).numpy()
        for rank in range(3):
            held = [index for index, key in enumerate(KEYS) if key % 3 == rank]
            self.dump([KEYS[index] for index in held], rows[held], rank, 3)
        keys, values = dynamicemb.read(self.path("dynamicemb_module", "collection"), "video", WIDTH)
        self.assertEqual(keys.tolist(), sorted(KEYS))
        for key, value in zip(keys.tolist(), values):
            self.assertTrue((value == rows[KEYS.index(key)]).all())
        placeholder = {"_embedding_collection._model_parallel_embedding_collection.embeddings.video.weight": torch.zeros(1)}
        file = self.save({**self.fused(), **self.outside, **placeholder})
        names = self.write_text("11\tshoe\n5\that\n999\tgone\n", "names")
        self.convert([file], "fused", "--dynamicemb", self.path("dynamicemb_module"), "--catalog", "--item-ids", names)
        self.assertEqual(self.lines("out", "catalog.jsonl"), [{"item_id": "hat", "sid": [1]}, {"item_id": "shoe", "sid": [3]}])
        self.assertIn("1 items of", self.said)
        self.assertEqual([line["key"] for line in self.lines("out", "video.rows.jsonl")], sorted(KEYS))
        written = load_file(self.path("out", "model.safetensors"))
        self.assertTrue((written[next(iter(self.items))].numpy() == values).all())

    def test_damaged_dynamic_embeddings_are_refused(self):
        home = self.path("dynamicemb_module", "collection")
        read = lambda: dynamicemb.read(home, "video", WIDTH)  # noqa: E731
        self.dump([1, 2], np.zeros((2, WIDTH)), 0, 2)
        self.refused("ranks [0] of [2]", read)
        self.dump([2], np.zeros((1, WIDTH)), 1, 2)
        self.refused("key 2 is there twice", read)
        self.dump([3], np.zeros((1, WIDTH - 1)), 1, 2)
        self.refused("expected 48", read)
        self.dump([3], np.zeros((1, WIDTH)), 0, 1)
        self.refused("ranks [0, 0, 1] of [1, 2]", read)


if __name__ == "__main__":
    unittest.main()
