#!/usr/bin/env python3
"""A synthetic shop: catalog, semantic IDs, shoppers, and the exact next-item distribution.

Why synthetic: the demo checkpoint has to be trainable by anybody in half an hour, free of anyone's data, and its quality
has to be judged against something better than a guess. This generator knows the true probability of every next item given
the visible history (`Oracle.predict`), so the recall of the best possible predictor is a number, not an opinion.

Standard library only; everything follows from one seed.


The shop
--------
8 departments > 48 categories > 367 product lines > 3,006 variants (the items). A variant is a line in a style:
a colour, a flavour, a scent or a theme. There are 24 styles, ordered on a circle, and neighbours are alike; the same style number
means the same mood in every category, so that a taste in styles carries over from one category to another.

Semantic ID of an item, 3 levels:

    a  category                 48 codes
    b  line within category     12 codes (5 to 10 lines per category)
    c  style                    24 codes

so the ID follows from what the item *is*. Some lines sell two shades of one style ("red", "dark red"); shades share the code
and hence the whole ID: these are the catalog's collisions.


The shoppers
------------
A shopper's next item x, given the history h and a hidden mood z (one of 12 taste clusters):

    p(x | z, h) =  0.40  complement(last item)        3 lines that go with the last item's line (60/28/12 %), in its style
                 + 0.10  complement(item before)      the same for the item before it: an interrupted errand
                 + 0.20  repeat(h)                    re-purchase of one of the consumables in h, most likely about 5 steps ago
                 + 0.12  compare(last item)           another variant of the last item's line
                 + 0.18  taste(z)                     the cluster's favourite categories, lines and styles

A term that does not exist yet (no consumable so far, no item before) hands its weight to taste (repeat) or to the first
complement. The mood drifts: with probability 0.04 per step it moves on, usually to a neighbouring cluster. So this is a hidden
Markov model whose emissions look at the history, and the distribution of the next item given the visible history alone,

    p(x | h) = sum over z of p(z | h) p(x | z, h),

is exact by the forward algorithm. That is `Oracle.predict`; no predictor that sees only the history can beat it on average.

Price, stock, `new` and `sale` are tags for filters; they do not influence the shoppers.


Files
-----
    python3 weights/demo/world.py catalog                    # catalog.jsonl, convention.json, sample_requests.jsonl
    python3 weights/demo/world.py sequences --out DIR        # train.jsonl, test.jsonl: {"user_id", "items": [item ids, oldest first]}

`sequences` writes about 80 MB, which is why it is not in the repository; the same seed gives the same bytes.
"""

import argparse
import bisect
import heapq
import itertools
import json
import math
import os
import random

SEED = 20
STYLES = 24
CLUSTERS = 12
LINE_CODES = 12
MAX_LINES = 10
DRIFT = 0.04
WEIGHTS = {"complement": 0.40, "complement_before": 0.10, "repeat": 0.20, "compare": 0.12, "taste": 0.18}
COMPLEMENT_SHARES = (0.60, 0.28, 0.12)
LEVEL_PATTERNS = ["<s_a_{}>", "<s_b_{}>", "<s_c_{}>"]
ITEM_BEGIN = "<|sid_begin|>"
BASE_TOKENS = ["<pad>", "<unk>", "<|endoftext|>"]  # ids 0, 1, 2; ITEM_BEGIN is 3; the SID tokens follow, level by level
FIRST_DAY = 1_735_689_600  # 2025-01-01 00:00 UTC

STYLE_NAMES = {
    "colour": "red coral orange amber yellow lime green mint teal turquoise sky-blue blue navy indigo violet purple magenta pink rose brown beige "
    "white grey black",
    "flavour": "strawberry raspberry cherry peach orange mango lemon lime apple mint matcha coconut vanilla honey caramel hazelnut almond chocolate "
    "mocha cinnamon ginger chilli smoked plain",
    "scent": "rose peony jasmine lily orange-blossom neroli lemon bergamot grapefruit green-tea mint eucalyptus sea-salt cucumber aloe coconut "
    "vanilla honey almond sandalwood cedar amber musk unscented",
    "theme": "dinosaurs dragons knights pirates ocean space robots trains cars construction farm forest jungle safari horses cats dogs unicorns "
    "fairies castle circus music winter rainbow",
    "meat": "beef veal bison lamb goat venison rabbit duck turkey chicken quail goose salmon trout tuna cod herring shrimp pumpkin carrot "
    "sweet-potato rice oat grain-free",
}
STYLE_NAMES = {kind: [name.replace("-", " ") for name in names.split()] for kind, names in STYLE_NAMES.items()}
SHADES = {"colour": "dark {}", "flavour": "extra {}", "scent": "intense {}", "theme": "{} deluxe", "meat": "{} senior"}

# department: (category, kind of style, consumable?, typical price, products, qualifiers). A line is a qualified product.
SHOP = {
    "sport": [
        (
            "running",
            "colour",
            0,
            60,
            "running shoe|running vest|running short|hydration belt",
            "Trail {}, women|Trail {}, men|Road {}, women|Road {}, men",
        ),
        ("cycling", "colour", 0, 70, "bike helmet|cycling jersey|saddle bag|bottle cage", "Road {}|Gravel {}|City {}"),
        ("yoga", "colour", 0, 35, "yoga mat|yoga block|yoga strap|meditation cushion", "Studio {}|Travel {}|Cork {}"),
        ("swimming", "colour", 0, 25, "swim goggle|swim cap|kickboard|swim towel", "Training {}|Junior {}|Open water {}"),
        ("climbing", "colour", 0, 85, "climbing shoe|harness|chalk bag|climbing rope", "Indoor {}|Alpine {}|Sport {}"),
        (
            "sport nutrition",
            "flavour",
            1,
            20,
            "protein powder|energy gel|recovery drink|protein bar",
            "Organic {}|Vegan {}|Whey {}",
        ),
    ],
    "fashion": [
        (
            "shoes",
            "colour",
            0,
            80,
            "sneaker|ankle boot|loafer|sandal",
            "Leather {}, women|Leather {}, men|Canvas {}, women|Canvas {}, men",
        ),
        ("knitwear", "colour", 0, 55, "jumper|cardigan|roll-neck|knit vest", "Merino {}|Cashmere {}|Cotton {}"),
        (
            "trousers",
            "colour",
            0,
            60,
            "chino|jeans|jogger|pleated trouser",
            "Slim {}, women|Slim {}, men|Wide {}, women|Wide {}, men",
        ),
        ("outerwear", "colour", 0, 140, "parka|raincoat|quilted jacket|trench coat", "Light {}|Lined {}|Recycled {}"),
        ("bags", "colour", 0, 75, "tote|backpack|crossbody bag|weekender", "Leather {}|Canvas {}|Nylon {}"),
        ("socks", "colour", 1, 12, "ankle sock|crew sock|knee sock|sneaker sock", "Merino {}|Cotton {}|Bamboo {}"),
    ],
    "home": [
        ("bedding", "colour", 0, 65, "duvet cover|pillowcase|fitted sheet|bedspread", "Linen {}|Percale {}|Flannel {}"),
        ("tableware", "colour", 0, 30, "dinner plate|cereal bowl|mug|serving dish", "Stoneware {}|Porcelain {}|Enamel {}"),
        ("lighting", "colour", 0, 90, "table lamp|pendant lamp|floor lamp|reading light", "Rattan {}|Metal {}|Paper {}"),
        ("rugs", "colour", 0, 120, "runner|area rug|door mat|bath mat", "Wool {}|Jute {}|Cotton {}"),
        ("candles", "scent", 1, 18, "pillar candle|jar candle|tea light|taper candle", "Soy {}|Beeswax {}|Rapeseed {}"),
        (
            "cleaning",
            "scent",
            1,
            8,
            "surface spray|dish soap|laundry liquid|floor cleaner",
            "Plant-based {}|Concentrated {}|Sensitive {}",
        ),
    ],
    "kitchen": [
        ("cookware", "colour", 0, 95, "saucepan|casserole|frying pan|wok", "Cast iron {}|Steel {}|Ceramic {}"),
        ("baking", "colour", 0, 22, "cake tin|mixing bowl|rolling pin|muffin tray", "Silicone {}|Non-stick {}|Enamel {}"),
        (
            "coffee gear",
            "colour",
            0,
            70,
            "moka pot|pour-over set|milk frother|coffee grinder",
            "Compact {}|Classic {}|Electric {}",
        ),
        ("knives", "colour", 0, 60, "chef's knife|paring knife|bread knife|santoku", "Forged {}|Ceramic {}|Light {}"),
        ("storage", "colour", 0, 16, "storage jar|lunch box|bread bin|spice rack", "Glass {}|Bamboo {}|Tin {}"),
        ("kitchen linen", "colour", 0, 14, "apron|tea towel|oven glove|napkin", "Linen {}|Cotton {}|Striped {}"),
    ],
    "grocery": [
        (
            "coffee",
            "flavour",
            1,
            14,
            "coffee beans|ground coffee|coffee capsules|cold brew",
            "Light roast {}|Dark roast {}|Decaf {}",
        ),
        ("tea", "flavour", 1, 9, "black tea|green tea|rooibos|herbal infusion", "Loose leaf {}|Bagged {}|Organic {}"),
        ("breakfast", "flavour", 1, 7, "granola|muesli|porridge|nut spread", "Crunchy {}|Gluten-free {}|Protein {}"),
        ("snacks", "flavour", 1, 5, "trail mix|rice cake|fruit bar|popcorn", "Organic {}|Sharing {}|Mini {}"),
        ("sweets", "flavour", 1, 6, "chocolate bar|fudge|biscuit|truffle", "Fair trade {}|Salted {}|Vegan {}"),
        ("drinks", "flavour", 1, 4, "kombucha|lemonade|oat drink|syrup", "Sparkling {}|Low sugar {}|Barista {}"),
    ],
    "beauty": [
        ("skin care", "scent", 1, 24, "face cream|face serum|cleanser|sun cream", "Hydrating {}|Soothing {}|Firming {}"),
        ("hair care", "scent", 1, 13, "shampoo|conditioner|hair mask|hair oil", "Repair {}|Volume {}|Curl {}"),
        ("bath", "scent", 1, 10, "shower gel|bath salt|soap bar|body scrub", "Calming {}|Energising {}|Mild {}"),
        ("fragrance", "scent", 0, 65, "eau de parfum|body mist|perfume oil|room spray", "Day {}|Night {}|Travel {}"),
        ("make-up", "colour", 1, 18, "lipstick|eye shadow|nail polish|eyeliner", "Matte {}|Shimmer {}|Vegan {}"),
        ("shaving", "scent", 1, 15, "shaving foam|after-shave balm|beard oil|shaving soap", "Classic {}|Sensitive {}|Barber {}"),
    ],
    "kids": [
        ("building sets", "theme", 0, 40, "brick set|marble run|magnet tiles|wooden blocks", "Starter {}|Big {}|Motor {}"),
        ("puzzles", "theme", 0, 16, "floor puzzle|jigsaw|cube puzzle|puzzle book", "48-piece {}|100-piece {}|300-piece {}"),
        (
            "picture books",
            "theme",
            0,
            14,
            "picture book|pop-up book|sticker book|bedtime stories",
            "My first {}|Big {}|Travel {}",
        ),
        ("costumes", "theme", 0, 28, "costume|cape|mask|dress-up hat", "Toddler {}|School {}|Party {}"),
        ("nursery", "theme", 0, 35, "night light|cot mobile|baby blanket|wall sticker", "Soft {}|Musical {}|Organic {}"),
        ("craft", "theme", 1, 11, "colouring set|stamp kit|modelling clay|bead kit", "Mini {}|Family {}|Glitter {}"),
    ],
    "pets": [
        ("dog food", "meat", 1, 28, "kibble|wet food|training treat|chew stick", "Puppy {}|Adult dog {}|Large breed {}"),
        ("cat food", "meat", 1, 22, "crunchy bites|pouch|mousse|creamy snack", "Kitten {}|Indoor cat {}|Sterilised cat {}"),
        ("dog gear", "colour", 0, 26, "leash|collar|dog harness|dog coat", "Reflective {}|Leather {}|Rope {}"),
        ("cat gear", "colour", 0, 45, "scratching post|cat bed|cat tunnel|litter tray", "Corner {}|Felt {}|Foldable {}"),
        ("pet beds", "colour", 0, 55, "dog bed|travel mat|crate pad|sofa cover", "Orthopaedic {}|Washable {}|Plush {}"),
        ("pet care", "scent", 1, 12, "pet shampoo|paw balm|coat spray|ear cleaner", "Oatmeal {}|Gentle {}|Puppy {}"),
    ],
}


def slug(text):
    kept = "".join(ch if ch.isalnum() else "-" for ch in text.lower().replace("'", ""))
    return "-".join(part for part in kept.split("-") if part)


def circle_distance(one, other):
    apart = abs(one - other)
    return min(apart, STYLES - apart)


def style_kernel(one, other, width):
    """How well two styles go together; the floor keeps every variant possible."""
    return math.exp(-0.5 * (circle_distance(one, other) / width) ** 2) + 0.004


def gaussian(rng):
    """Box-Muller on rng.random(), whose stream is the one Python promises to keep."""
    return math.sqrt(-2.0 * math.log(1.0 - rng.random())) * math.cos(2.0 * math.pi * rng.random())


def pick(rng, count):
    return int(rng.random() * count)


def sample_without_replacement(rng, pool, count):
    pool = list(pool)
    return [pool.pop(pick(rng, len(pool))) for _ in range(count)]


class Table:
    """A discrete distribution over item numbers: probabilities, and sampling by bisection."""

    def __init__(self, weights):
        total = math.fsum(weights.values())
        self.items = list(weights)
        self.probability = {item: weight / total for item, weight in weights.items()}
        self.edges = list(itertools.accumulate(self.probability[item] for item in self.items))

    def draw(self, rng):
        return self.items[min(bisect.bisect_right(self.edges, rng.random()), len(self.items) - 1)]

    def __getitem__(self, item):
        return self.probability.get(item, 0.0)


def repeat_kernel(lag):
    """Weight of re-buying what was bought `lag` steps ago (1 = the last item, which is not re-bought at once)."""
    return float(lag - 1) if lag <= 6 else 5.0 * 0.85 ** (lag - 6)


class World:
    """The shop and its shoppers. Items are numbered in catalog order; `items[n]` is what catalog.jsonl holds."""

    def __init__(self, seed=SEED):
        self.seed = seed
        rng = random.Random(seed)
        self.items = []  # {"item_id", "sid", "tags", "title"}
        self.line_of, self.style_of, self.consumable = [], [], []
        self.lines = []  # per line: its item numbers
        self.line_category = []
        self.category_lines = []
        self.category_department = []
        self._attraction = []  # how well an item sells within its line
        self._build_catalog(rng)
        self._build_complements(rng)
        self._build_clusters(rng)
        self.item_number = {item["item_id"]: number for number, item in enumerate(self.items)}
        self._styled = {}
        self._compared = {}
        self._complemented = {}

    # ---- the shop

    def _build_catalog(self, rng):
        taken = set()
        for department_number, (department, categories) in enumerate(SHOP.items()):
            for name, kind, consumable, price, products, qualifiers in categories:
                category = len(self.category_lines)
                self.category_department.append(department_number)
                combinations = [q.format(p) for p in products.split("|") for q in qualifiers.split("|")]
                count = 5 + pick(rng, MAX_LINES - 4)
                lines = []
                for line_code, line_name in enumerate(sample_without_replacement(rng, combinations, count)):
                    lines.append(len(self.lines))
                    self.line_category.append(category)
                    self.lines.append([])
                    line_price = price * math.exp(0.35 * gaussian(rng))
                    styles = sorted(sample_without_replacement(rng, range(STYLES), 5 + pick(rng, 7)))
                    for style in styles:
                        words = [STYLE_NAMES[kind][style]]
                        if rng.random() < 0.04:
                            words.append(SHADES[kind].format(words[0]))
                        for word in words:
                            title = f"{line_name}, {word}"
                            item_id = slug(title)
                            if item_id in taken:
                                item_id = slug(f"{name} {title}")
                            assert item_id not in taken, item_id
                            taken.add(item_id)
                            tags = [f"dept:{slug(department)}", f"cat:{slug(name)}"]
                            paid = line_price * math.exp(0.1 * gaussian(rng))
                            tags.append("price:under-20" if paid < 20 else "price:20-to-60" if paid < 60 else "price:over-60")
                            tags += ["in_stock"] if rng.random() < 0.92 else []
                            tags += ["new"] if rng.random() < 0.08 else []
                            tags += ["sale"] if rng.random() < 0.12 else []
                            self.lines[-1].append(len(self.items))
                            self.line_of.append(lines[-1])
                            self.style_of.append(style)
                            self.consumable.append(bool(consumable))
                            self._attraction.append(math.exp(0.4 * gaussian(rng)))
                            self.items.append(
                                {"item_id": item_id, "sid": [category, line_code, style], "tags": tags, "title": title}
                            )
                self.category_lines.append(lines)

    def _build_complements(self, rng):
        """Each line gets three lines that go with it: same category, same department, elsewhere, in a random order of
        strength."""
        self.complements = []
        for line, category in enumerate(self.line_category):
            department = self.category_department[category]
            near = [other for other in self.category_lines[category] if other != line]
            sibling = [o for o, c in enumerate(self.line_category) if c != category and self.category_department[c] == department]
            far = [o for o, c in enumerate(self.line_category) if self.category_department[c] != department]
            chosen = [pool[pick(rng, len(pool))] for pool in (near, sibling, far)]
            self.complements.append(sample_without_replacement(rng, chosen, 3))

    def _build_clusters(self, rng):
        """12 tastes: favourite categories, a favourite style, and within a category a preference among its lines."""
        categories = len(self.category_lines)
        self.tastes = []
        for cluster in range(CLUSTERS):
            wanted = [0.1 / categories] * categories
            for category, share in zip(sample_without_replacement(rng, range(categories), 5), (0.32, 0.23, 0.16, 0.11, 0.08)):
                wanted[category] += share
            style = 2 * cluster  # neighbouring clusters like neighbouring styles
            weights = {}
            for category, lines in enumerate(self.category_lines):
                order = sample_without_replacement(rng, lines, len(lines))
                zipf = math.fsum(1.0 / (rank + 1) for rank in range(len(order)))
                for rank, line in enumerate(order):
                    share = wanted[category] / (rank + 1) / zipf
                    for item, probability in self._in_style(line, style, 2.5).items():
                        weights[item] = share * probability
            self.tastes.append(Table(dict(sorted(weights.items()))))
        self.drift = []
        for cluster in range(CLUSTERS):
            row = [DRIFT * 0.25 / CLUSTERS] * CLUSTERS
            row[cluster] += 1.0 - DRIFT
            row[(cluster + 1) % CLUSTERS] += DRIFT * 0.375
            row[(cluster - 1) % CLUSTERS] += DRIFT * 0.375
            self.drift.append(row)
        self._drift_tables = [Table(dict(enumerate(row))) for row in self.drift]

    def _in_style(self, line, style, width, without=None):
        weights = {
            item: self._attraction[item] * style_kernel(self.style_of[item], style, width)
            for item in self.lines[line]
            if item != without
        }
        total = math.fsum(weights.values())
        return {item: weight / total for item, weight in weights.items()}

    # ---- the terms of the next-item distribution

    def complement(self, item):
        line, style = self.line_of[item], self.style_of[item]
        if (line, style) not in self._complemented:
            weights = {}
            for other, share in zip(self.complements[line], COMPLEMENT_SHARES):
                for number, probability in self._in_style(other, style, 1.3).items():
                    weights[number] = weights.get(number, 0.0) + share * probability
            self._complemented[line, style] = Table(weights)
        return self._complemented[line, style]

    def compare(self, item):
        if item not in self._compared:
            self._compared[item] = Table(self._in_style(self.line_of[item], self.style_of[item], 2.5, without=item))
        return self._compared[item]

    def repeat(self, history):
        """Re-purchase: the history's consumables, the last item excepted, weighed by how long ago. None if there is none."""
        weights = {}
        for lag in range(2, min(len(history), 40) + 1):
            item = history[-lag]
            if self.consumable[item]:
                weights[item] = weights.get(item, 0.0) + repeat_kernel(lag)
        return Table(weights) if weights else None

    def terms(self, history):
        """The visible terms [(weight, Table)] and the weight of taste; the weights sum to 1."""
        taste = WEIGHTS["taste"]
        if not history:
            return [], 1.0
        visible = []
        strong = WEIGHTS["complement"]
        if len(history) > 1:
            visible.append((WEIGHTS["complement_before"], self.complement(history[-2])))
        else:
            strong += WEIGHTS["complement_before"]
        visible.append((strong, self.complement(history[-1])))
        visible.append((WEIGHTS["compare"], self.compare(history[-1])))
        repeat = self.repeat(history)
        if repeat:
            visible.append((WEIGHTS["repeat"], repeat))
        else:
            taste += WEIGHTS["repeat"]
        return visible, taste

    # ---- shoppers

    def shopper(self, number):
        """One shopper's item numbers, oldest first. Independent of all other shoppers: seeded by (world, number)."""
        rng = random.Random(self.seed * 1_000_003 + number + 1)
        if rng.random() < 0.005:  # a few very long histories, so that a model meets them in training
            length = 200 + pick(rng, 300)
        else:
            length = max(6, min(200, round(math.exp(3.2 + 0.6 * gaussian(rng)))))
        mood = pick(rng, CLUSTERS)
        history = []
        for _ in range(length):
            history.append(self._next(rng, mood, history))
            mood = self._drift_tables[mood].draw(rng)
        return history

    def _next(self, rng, mood, history):
        visible, _ = self.terms(history)
        point = rng.random()
        for weight, table in visible:
            if point < weight:
                return table.draw(rng)
            point -= weight
        return self.tastes[mood].draw(rng)

    def ids(self, numbers):
        return [self.items[number]["item_id"] for number in numbers]


class Oracle:
    """The exact distribution of the next item given the visible history alone (forward algorithm over the hidden mood)."""

    def __init__(self, world):
        self.world = world

    def mood(self, history):
        """p(mood of the next step | history)."""
        belief = [1.0 / CLUSTERS] * CLUSTERS
        for step, item in enumerate(history):
            visible, taste = self.world.terms(history[:step])
            seen = math.fsum(weight * table[item] for weight, table in visible)
            belief = [b * (seen + taste * self.world.tastes[z][item]) for z, b in enumerate(belief)]
            total = math.fsum(belief)
            belief = [b / total for b in belief]
            belief = [math.fsum(belief[y] * self.world.drift[y][z] for y in range(CLUSTERS)) for z in range(CLUSTERS)]
        return belief

    def predict(self, history):
        """p(next item | history): one probability per item number, summing to 1."""
        probabilities = [0.0] * len(self.world.items)
        visible, taste = self.world.terms(history)
        for z, belief in enumerate(self.mood(history)):
            share = taste * belief
            for item, probability in self.world.tastes[z].probability.items():
                probabilities[item] += share * probability
        for weight, table in visible:
            for item, probability in table.probability.items():
                probabilities[item] += weight * probability
        return probabilities

    def best(self, history, count):
        """The `count` most probable next items, and the probability that one of them is the next (the best possible recall)."""
        probabilities = self.predict(history)
        top = heapq.nsmallest(count, range(len(probabilities)), key=lambda item: (-probabilities[item], item))
        return top, math.fsum(probabilities[item] for item in top)


def convention(world):
    """convention.json: how histories and semantic IDs are written as tokens. No end token: it would cost a position per item and
    predict nothing. The begin token is the position where level a is predicted; generation starts from it."""
    counts = [len(world.category_lines), LINE_CODES, STYLES]
    begin = {"text": ITEM_BEGIN, "id": len(BASE_TOKENS)}
    size = len(BASE_TOKENS) + 1 + sum(counts)
    return {
        "format": 1,
        "model": "decoder",
        "levels": 3,
        "level_token_patterns": LEVEL_PATTERNS,
        "level_code_counts": counts,
        "codes_with_tokens": "all",
        "item_begin_token": begin,
        "item_end_token": None,
        "item_separator": "",
        "prompt_prefix": "",
        "prompt_suffix": "",
        "generation_begin": begin,
        "add_special_tokens": False,
        "tail_tokens": [],
        "decoder_start_token": None,
        "generated_steps": 3,
        "history_order": "oldest first",
        "catalog_sid_form": "codes",
        "vocab_size": size,
        "tokenizer_size": size,
    }


# Training shoppers are numbered from 0, held-out ones from here.
FIRST_HELD_OUT = 10_000_000


def sample_requests(world, count=20):
    """Requests as a shop would send them, from held-out shoppers; the last item, which the model should guess, is left out."""
    for number in range(FIRST_HELD_OUT, FIRST_HELD_OUT + count):
        items = world.shopper(number)[:-1]
        rng = random.Random(number)
        time = FIRST_DAY + pick(rng, 90 * 86_400)
        history, seen = [], set()
        for item in items:
            action = "purchase" if item in seen and world.consumable[item] else "view"
            seen.add(item)
            history.append({"item_id": world.items[item]["item_id"], "action": action, "timestamp": time})
            time += int(60 + 86_400 * rng.random() ** 4)
        yield {"user_id": f"shopper-{number}", "history": history, "num_items": 10}


def write_lines(path, records):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    commands = parser.add_subparsers(dest="command", required=True)
    catalog = commands.add_parser("catalog", help="write catalog.jsonl, convention.json and sample_requests.jsonl")
    catalog.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)))
    sequences = commands.add_parser("sequences", help="write train.jsonl and test.jsonl")
    sequences.add_argument("--out", required=True)
    sequences.add_argument("--train-users", type=int, default=80_000)
    sequences.add_argument("--test-users", type=int, default=4_000)
    arguments = parser.parse_args()

    world = World(arguments.seed)
    os.makedirs(arguments.out, exist_ok=True)
    if arguments.command == "catalog":
        write_lines(os.path.join(arguments.out, "catalog.jsonl"), world.items)
        write_lines(os.path.join(arguments.out, "sample_requests.jsonl"), sample_requests(world))
        with open(os.path.join(arguments.out, "convention.json"), "w", encoding="utf-8", newline="\n") as file:
            json.dump(convention(world), file, indent=1)
            file.write("\n")
        print(f"{len(world.items)} items, {len({tuple(i['sid']) for i in world.items})} semantic IDs, {len(world.lines)} lines")
    else:
        for name, first, count in (("train", 0, arguments.train_users), ("test", FIRST_HELD_OUT, arguments.test_users)):
            records = ({"user_id": f"shopper-{n}", "items": world.ids(world.shopper(n))} for n in range(first, first + count))
            write_lines(os.path.join(arguments.out, f"{name}.jsonl"), records)


if __name__ == "__main__":
    main()
