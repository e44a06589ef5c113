"""The two cases: what is asked of both sides, and that they answer the same."""
import torch

from floors import floors_ranking, floors_retrieval
from measuring import Case, interleave, measure_peers
from openvino_model import converted
from report import summary
from shapes import NEW_EVENTS, PAGE, RANK_HISTORY, TASKS, TOLERANCE
from users import User


def check_cached(answer, kind, wanted):
    cached = answer["usage"]["cached_tokens"]
    if answer["dropped_history"] or answer["unknown_items"]:
        raise SystemExit(f"events were dropped: {answer['dropped_history']} {answer['unknown_items'][:3]}")
    if cached != 0 if kind != "warm" else cached < wanted:
        raise SystemExit(f"a visit called {kind} had {cached} of {answer['usage']['context_tokens']} tokens cached")


def ways_of(model_eager, model_compiled):
    ways = {"torch plain": (model_eager, "plain"), "torch tuned": (model_eager, "tuned")}
    if model_compiled is not None:
        ways["torch compiled"] = (model_compiled, "tuned")
    return ways


def prepared(run, inputs):
    """What is to be timed for a user: `run` on inputs that were made before."""
    def prepare(number):
        given = inputs(number)
        return lambda: run(*given)
    return prepare


def retrieval(server, models, events, options):
    case, worst = Case(), 0.0
    users = {}

    def user(number):
        if number not in users:
            users[number] = User(number, events + NEW_EVENTS)
        return users[number]

    def inputs(number, count):
        who = user(number)
        return torch.from_numpy(who.items[:count]), torch.from_numpy(who.times[: count + 1])

    def visit(number, kind, tenant):
        count = events if kind == "cold" else events + NEW_EVENTS
        took, answer = server.post("/v1/recommend", user(number).recommend(count, f"{events}-{tenant}"))
        check_cached(answer, kind, (events - 1) // PAGE * PAGE)
        return took, answer

    def compare(number, kind, answer):
        nonlocal worst
        count = events if kind == "cold" else events + NEW_EVENTS
        scores, items = models[0].retrieve(*inputs(number, count), "tuned")
        found = [int(item["item_id"][1:]) for item in answer["items"]]
        if found != items.tolist():
            raise SystemExit(f"other items, {kind}: {found} {items.tolist()} {scores.tolist()}")
        worst = max(worst, max(abs(item["score"] - score) for item, score in zip(answer["items"], scores.tolist())))
        if worst > TOLERANCE:
            raise SystemExit(f"scores differ by {worst}")

    def whole(model, way):
        def prepare(number):
            given = inputs(number, events + NEW_EVENTS)
            return lambda: model.retrieve(*given, way)
        return prepare

    def cached(model):
        def prepare(number):
            before = model.retrieve(*inputs(number, events), "tuned")
            assert before is not None
            given = inputs(number, events + NEW_EVENTS)
            # The last row of the first visit saw the time of that query, so it is computed again.
            return lambda: model.retrieve(*given, "tuned", first=events - 1)
        return prepare

    # All ways of PyTorch agree with each other before anything is timed.
    given = inputs(0, events + NEW_EVENTS)
    expected = models[0].retrieve(*given, "plain")
    for name, (model, way) in ways_of(*models).items():
        scores, items = model.retrieve(*given, way)
        kept, kept_items = cached(model)(0)()
        if items.tolist() != expected[1].tolist() or kept_items.tolist() != items.tolist():
            raise SystemExit(f"{name} finds other items")
        worst = max(worst, (scores - expected[0]).abs().max().item(), (kept - expected[0]).abs().max().item())
    ways = {name: whole(model, way) for name, (model, way) in ways_of(*models).items()}
    if options.openvino:
        run = converted(lambda items, times: models[0].retrieve(items, times, "plain"), given, options.threads)
        scores, items = run(*given)
        if items.tolist() != expected[1].tolist():
            raise SystemExit("OpenVINO finds other items")
        worst = max(worst, (scores - expected[0]).abs().max().item())
        ways["openvino"] = prepared(run, lambda number: inputs(number, events + NEW_EVENTS))
    cached_ways = {name.replace("torch", "torch cached,"): cached(model)
                   for name, (model, way) in ways_of(*models).items() if way == "tuned"}
    interleave(case, visit, compare, lambda: measure_peers(case, ways, cached_ways, options), options)
    return summary(case, worst, floors_retrieval(events, options.gflops), None)


def ranking(server, models, candidates, options):
    case, worst = Case(), 0.0
    users = {}

    def user(number):
        if number not in users:
            users[number] = User(number, RANK_HISTORY + NEW_EVENTS)
        return users[number]

    def inputs(number, count):
        who = user(number)
        parts = who.items[:count], who.actions[:count], who.candidates[:candidates]
        return [torch.from_numpy(part) for part in parts]

    expected = {}

    def visit(number, kind, tenant):
        count = RANK_HISTORY if kind == "cold" else RANK_HISTORY + NEW_EVENTS
        took, answer = server.post("/v1/rank", user(number).rank(count, candidates, f"{candidates}-{tenant}"))
        check_cached(answer, kind, (2 * RANK_HISTORY - 1) // PAGE * PAGE)
        return took, answer

    def compare(number, kind, answer):
        nonlocal worst
        count = RANK_HISTORY if kind == "cold" else RANK_HISTORY + NEW_EVENTS
        if (number, count) not in expected:
            expected.clear()
            expected[number, count] = models[0].rank(*inputs(number, count), "tuned")
        tasks = [f"task{task}" for task in range(TASKS)]
        found = torch.tensor([[one["predictions"][task] for task in tasks] for one in answer["candidates"]])
        ids = [int(one["item_id"][1:]) for one in answer["candidates"]]
        if ids != user(number).candidates[:candidates].tolist():
            raise SystemExit("the candidates come in another order")
        worst = max(worst, (found - expected[number, count]).abs().max().item())
        if worst > TOLERANCE:
            raise SystemExit(f"predictions differ by {worst}")

    def whole(model, way):
        def prepare(number):
            given = inputs(number, RANK_HISTORY + NEW_EVENTS)
            return lambda: model.rank(*given, way)
        return prepare

    def cached(model):
        def prepare(number):
            model.rank(*inputs(number, RANK_HISTORY)[:2], torch.arange(1, 9), "tuned")
            given = inputs(number, RANK_HISTORY + NEW_EVENTS)
            return lambda: model.rank(*given, "tuned", first=2 * RANK_HISTORY)
        return prepare

    given = inputs(0, RANK_HISTORY + NEW_EVENTS)
    plain = models[0].rank(*given, "plain")
    for model, way in ways_of(*models).values():
        worst = max(worst, (model.rank(*given, way) - plain).abs().max().item())
        worst = max(worst, (cached(model)(0)() - plain).abs().max().item())
    ways = {name: whole(model, way) for name, (model, way) in ways_of(*models).items()}
    if options.openvino:
        run = converted(lambda *rows: models[0].rank(*rows, "plain"), tuple(given), options.threads)
        worst = max(worst, (run(*given)[0] - plain).abs().max().item())
        ways["openvino"] = prepared(run, lambda number: inputs(number, RANK_HISTORY + NEW_EVENTS))
    if worst > TOLERANCE:
        raise SystemExit(f"predictions of the peers' ways differ by {worst}")
    cached_ways = {name.replace("torch", "torch cached,"): cached(model)
                   for name, (model, way) in ways_of(*models).items() if way == "tuned"}
    interleave(case, visit, compare, lambda: measure_peers(case, ways, cached_ways, options), options)
    return summary(case, worst, floors_ranking(candidates, options.gflops), candidates)
