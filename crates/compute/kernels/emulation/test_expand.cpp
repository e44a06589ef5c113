// Expansion of beams against a search that looks at every candidate: whole searches, step by step, every bit of every output.
//
// Prints "expand: passed" and returns 0, or says what is wrong and returns 1.
//
// The reference computes scores by the same two roundings, so everything must be equal: the beams and their order, their
// parents and lineages, the count. Normalisers over allowed continuations are compared with double precision, and then taken
// over by the reference.
#include "../branch_rows.cu"
#include "../expand.cu"
#include "../expand_small.cu"

#include <map>
#include <set>

namespace {

int failures = 0;
std::string label;

void check(bool condition, const std::string &what) {
    if (!condition && failures < 20) std::printf("expand: %s: %s\n", label.c_str(), what.c_str());
    failures += !condition;
}

// Steele et al. 2014, "splitmix64".
struct RandomBits {
    using result_type = uint64_t;
    uint64_t state = 20260101;
    static constexpr uint64_t min() { return 0; }
    static constexpr uint64_t max() { return ~uint64_t(0); }
    uint64_t operator()() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
} random_bits;
uint32_t below(uint32_t limit) { return uint32_t(random_bits() % limit); }
// Nearly so: the sum of four uniform numbers, of variance 1.
float gaussian() {
    const uint64_t bits = random_bits();
    int sum = 0;
    for (int part = 0; part < 4; ++part) sum += int(bits >> 16 * part & 0xffff);
    return (float(sum) - 131070.0f) / 37837.0f;
}
const float INFINITE = std::numeric_limits<float>::infinity();
const float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// ---------------------------------------------------------------------------------------------------------------------
// A catalog as the catalog crate lays it out
// ---------------------------------------------------------------------------------------------------------------------

struct Level {
    std::vector<uint32_t> symbols;   // of the nodes; none at the root
    std::vector<uint32_t> children;  // offsets; empty: see `identity`
    std::vector<uint32_t> leaves;    // offsets; empty: node n owns leaf n
    bool identity = false;           // node n has the one child n
};

struct Catalog {
    std::vector<Level> levels;
    uint32_t leaves = 0;
    uint32_t first_token = 0, tokens = 0;  // all symbols lie in this range
    std::vector<uint32_t> codebooks;       // and those of a level in the first part of it
};

// `paths` in order, pairwise different, all of one depth.
Catalog catalog_of(const std::vector<std::vector<uint32_t>> &paths, uint32_t first_token, uint32_t tokens) {
    Catalog catalog;
    const size_t depth = paths[0].size();
    catalog.levels.resize(depth + 1);
    catalog.leaves = uint32_t(paths.size());
    catalog.first_token = first_token, catalog.tokens = tokens;
    for (size_t at = 0; at < paths.size(); ++at) {
        size_t common = 0;
        if (at > 0)
            while (paths[at][common] == paths[at - 1][common]) ++common;
        for (size_t level = at > 0 ? common + 1 : 0; level <= depth; ++level) {
            if (level > 0) catalog.levels[level].symbols.push_back(first_token + paths[at][level - 1]);
            catalog.levels[level].leaves.push_back(uint32_t(at));
            // The children of this node begin with the one that is pushed next.
            if (level < depth) catalog.levels[level].children.push_back(uint32_t(catalog.levels[level + 1].symbols.size()));
        }
    }
    for (size_t level = 0; level <= depth; ++level) {
        Level &l = catalog.levels[level];
        l.leaves.push_back(catalog.leaves);
        if (level < depth) l.children.push_back(uint32_t(catalog.levels[level + 1].symbols.size()));
        if (l.leaves.size() == catalog.leaves + 1) l.leaves.clear();
        if (level < depth && l.children.size() == catalog.levels[level + 1].symbols.size() + 1)
            l.children.clear(), l.identity = true;
    }
    return catalog;
}

// `count` paths over codebooks of the given sizes; with `skew`, half of them share all but the last code.
Catalog random_catalog(const std::vector<uint32_t> &codebooks, uint32_t count, bool skew) {
    std::set<std::vector<uint32_t>> paths;
    uint32_t tokens = 0;
    for (uint32_t size : codebooks) tokens = std::max(tokens, size);
    for (uint32_t tries = 0; tries < 4 * count && paths.size() < count; ++tries) {
        std::vector<uint32_t> path;
        for (size_t level = 0; level < codebooks.size(); ++level) {
            path.push_back(skew && tries % 2 == 0 && level + 1 < codebooks.size() ? 0 : below(codebooks[level]));
        }
        paths.insert(path);
    }
    Catalog catalog = catalog_of({paths.begin(), paths.end()}, below(1000), tokens);
    catalog.codebooks = codebooks;
    return catalog;
}

struct FilterArrays {
    Filter filter{};
    std::vector<u64> words;
    std::vector<uint32_t> ranks, list;
    std::vector<char> allowed;     // what it means
    std::vector<uint32_t> before;  // allowed leaves before each

    bool any(uint32_t begin, uint32_t end) const { return before[end] > before[begin]; }
};

// kind: 0 all, 1 bits, 2 bits without some, 3 all without some, 4 some, 5 none, 6 bits that are all zero
std::unique_ptr<FilterArrays> filter_of(uint32_t leaves, int kind, double density) {
    auto made = std::make_unique<FilterArrays>();
    std::bernoulli_distribution chosen(density);
    made->allowed.assign(leaves, kind == 0 || kind == 3);
    const bool has_bits = kind == 1 || kind == 2 || kind == 6;
    if (has_bits) {
        made->words.assign((leaves + 63) / 64, 0);
        for (uint32_t leaf = 0; leaf < leaves; ++leaf) {
            if (kind != 6 && chosen(random_bits)) made->words[leaf / 64] |= 1ull << leaf % 64, made->allowed[leaf] = 1;
        }
        uint32_t rank = 0;
        made->ranks.push_back(0);
        for (size_t word = 0; word < made->words.size(); ++word) {
            rank += __popcll(made->words[word]);
            if (word % 8 == 7 || word + 1 == made->words.size()) made->ranks.push_back(rank);
        }
    }
    for (uint32_t leaf = 0; leaf < leaves; ++leaf) {
        if ((kind == 2 || kind == 3) && made->allowed[leaf] && chosen(random_bits))
            made->list.push_back(leaf), made->allowed[leaf] = 0;
        if (kind == 4 && chosen(random_bits)) made->list.push_back(leaf), made->allowed[leaf] = 1;
    }
    made->before.push_back(0);
    for (char allowed : made->allowed) made->before.push_back(made->before.back() + allowed);
    made->filter = {made->words.data(), made->ranks.data(), made->list.data(), uint32_t(made->list.size()),
                    has_bits                 ? FILTER_BITS
                    : kind == 4 || kind == 5 ? FILTER_LIST
                                             : FILTER_ALL};
    return made;
}

// ---------------------------------------------------------------------------------------------------------------------
// The reference
// ---------------------------------------------------------------------------------------------------------------------

struct Beam {
    uint32_t node, token;
    float score;
    uint32_t parent;
    std::vector<uint32_t> lineage;
};

struct Memory {
    std::vector<uint32_t> nodes, tokens, parents, lineage;
    std::vector<float> scores;
    uint32_t count = 0xffffffffu;

    Memory(uint32_t width, uint32_t entries)
        : nodes(width, ~0u),
          tokens(width, ~0u),
          parents(width, ~0u),
          lineage(size_t(width) * entries, ~0u),
          scores(width, NOT_A_NUMBER) {}
    Beams beams() { return {nodes.data(), tokens.data(), scores.data(), parents.data(), lineage.data(), &count}; }
};

enum class Logits { Gaussian, Few, Equal, SomeInfinite, FarApart, Bf16, Increasing, Boundary };

struct Search {
    const Catalog *catalog;
    const FilterArrays *filter;
    // What is normalised over, or null: the same.
    const FilterArrays *over = nullptr;
    uint32_t width, capacity;
    std::vector<int> steps;  // -1 a level, else a fixed token, relative to the first one
    bool full;
    Logits logits;
    size_t level = 0;  // of the beams
    uint32_t start = 0;

    std::vector<Beam> beams;
    uint32_t done = 0;
    uint32_t failed = 77;
    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<float> values, normalizers;
    size_t stride = 0;
    std::vector<unsigned char> workspace;
    void *aligned = nullptr;
    bool expect_failure = false;

    bool is_level() const { return steps[done] < 0; }
    float &logit(size_t beam, uint32_t token) { return values[beam * stride + (token - catalog->first_token)]; }
    float score(size_t beam, uint32_t token) { return beams[beam].score + (logit(beam, token) - normalizers[beam]); }
    void children(uint32_t node, uint32_t &first, uint32_t &last) const {
        const Level &l = catalog->levels[level];
        first = l.identity ? node : l.children[node];
        last = l.identity ? node + 1 : l.children[node + 1];
    }
    bool allowed(uint32_t child) const { return allowed_by(*filter, child); }
    bool allowed_by(const FilterArrays &by, uint32_t child) const {
        const Level &l = catalog->levels[level + 1];
        return l.leaves.empty() ? by.any(child, child + 1) : by.any(l.leaves[child], l.leaves[child + 1]);
    }

    uint64_t most_children() const {
        uint64_t sum = 0;
        for (const Beam &beam : beams) {
            uint32_t first = 0, last = 1;
            if (is_level()) children(beam.node, first, last);
            sum += last - first;
        }
        return sum;
    }

    void begin() {
        beams = {{start, 0, 0.0f, 0, {}}};
        memory.push_back(std::make_unique<Memory>(width, 1));
    }

    // Logits and normalisers for the beams. What no child of the level can ask for is not a number, nor are rows of beams
    // that are not alive.
    void compute() {
        const uint32_t tokens = is_level() ? catalog->codebooks[level] : 1;
        // The lowest score of a bin, if the best beam has score 0.
        uint32_t boundary = ordered(__float_as_uint(-1.25f));
        while (bin_of(0.0f, __uint_as_float(unordered(boundary))) == 40) ++boundary;
        stride = catalog->tokens + below(5);
        values.assign(width * stride, NOT_A_NUMBER);
        normalizers.assign(width, NOT_A_NUMBER);
        for (size_t beam = 0; beam < beams.size(); ++beam) {
            double sum = 0;
            float max = -INFINITE;
            for (uint32_t code = 0; code < tokens; ++code) {
                float value = 0;
                switch (logits) {
                case Logits::Gaussian: value = 3 * gaussian(); break;
                case Logits::Few: value = float(below(3)); break;
                case Logits::Equal: value = 1.5f; break;
                case Logits::SomeInfinite: value = below(3) == 0 ? -INFINITE : gaussian(); break;
                case Logits::FarApart: value = 300 * gaussian(); break;
                case Logits::Bf16: value = __bfloat162float(__float2bfloat16_rn(10 * gaussian())); break;
                case Logits::Increasing: value = float(code) / 64; break;
                case Logits::Boundary: value = __uint_as_float(unordered(boundary + below(5) - 2)); break;
                }
                if (code == 0) value = logits == Logits::Boundary ? 0.0f : 1.0f;  // something finite
                values[beam * stride + code] = value;
                max = std::max(max, value);
            }
            for (uint32_t code = 0; code < tokens; ++code) sum += std::exp(double(values[beam * stride + code]) - max);
            // Some of the vocabulary lies elsewhere.
            normalizers[beam] = std::max(max, float(max + std::log(sum * (1 + 0.1 * below(10)))));
            // So that in the first step scores are the logits.
            if (logits == Logits::Boundary) normalizers[beam] = 0.0f;
        }
    }

    ExpandStep step() {
        ExpandStep s{};
        if (is_level()) {
            const Level &at = catalog->levels[level], &next = catalog->levels[level + 1];
            s.children = at.identity ? nullptr : at.children.data();
            s.symbols = next.symbols.data();
            s.leaves = next.leaves.empty() ? nullptr : next.leaves.data();
        }
        memory.push_back(std::make_unique<Memory>(width, done + 1));
        workspace.assign(expand_workspace_bytes(width, capacity) + 16, 0xa5);
        aligned = workspace.data() + (16 - reinterpret_cast<uintptr_t>(workspace.data()) % 16) % 16;
        s.filter = filter->filter;
        s.normalize_over = (over != nullptr ? over : filter)->filter;
        s.logits = values.data();
        s.normalizers = full ? normalizers.data() : nullptr;
        s.logits_stride = stride;
        s.from = memory[done]->beams(), s.to = memory[done + 1]->beams();
        s.failed = &failed;
        s.workspace = static_cast<unsigned char *>(aligned);
        s.first_token = catalog->first_token;
        s.kind = is_level() ? STEP_LEVEL : STEP_FIXED;
        s.fixed_token = is_level() ? 0xffffffffu : catalog->first_token + uint32_t(steps[done]);
        s.width = width, s.capacity = capacity;
        s.is_first = done == 0, s.start_node = start;
        s.steps_done = done;
        return s;
    }

    // What the step must have made of it.
    void advance(const ExpandStep &device) {
        const Memory &out = *memory[done + 1];
        std::vector<Beam> candidates;
        const Workspace w = workspace_of(device);
        for (size_t beam = 0; beam < beams.size(); ++beam) {
            uint32_t first = beams[beam].node, last = first + 1;
            if (is_level()) children(beams[beam].node, first, last);
            std::vector<std::pair<uint32_t, uint32_t>> found;
            for (uint32_t child = first; child < last; ++child) {
                if (!is_level()) found.push_back({child, device.fixed_token});
                else if (allowed(child)) found.push_back({child, catalog->levels[level + 1].symbols[child]});
            }
            if (!full && !found.empty() && !expect_failure) {
                std::vector<uint32_t> normalized;
                for (auto [child, token] : found) if (over == nullptr || !is_level()) normalized.push_back(token);
                for (uint32_t child = first; child < last && over != nullptr && is_level(); ++child) {
                    if (allowed_by(*over, child)) normalized.push_back(catalog->levels[level + 1].symbols[child]);
                }
                double sum = 0, max = -INFINITE;
                for (uint32_t token : normalized) max = std::max(max, double(logit(beam, token)));
                for (uint32_t token : normalized) sum += std::exp(double(logit(beam, token)) - max);
                const double truth = max + std::log(sum);
                if (std::isfinite(truth)) {
                    check(std::abs(w.normalizers[beam] - truth) <= 2e-6 * std::max(1.0, std::abs(truth)),
                          "a normaliser over allowed continuations");
                } else {
                    expect_failure = true;
                }
                normalizers[beam] = w.normalizers[beam];
            }
            for (auto [child, token] : found) {
                candidates.push_back({child, token, score(beam, token), uint32_t(beam), {}});
            }
        }
        const auto better = [](const Beam &a, const Beam &b) { return a.score != b.score ? a.score > b.score : a.node < b.node; };
        if (expect_failure) candidates.clear();
        std::sort(candidates.begin(), candidates.end(), better);
        if (candidates.size() > width) candidates.resize(width);
        for (size_t rank = 0; rank < candidates.size(); ++rank) {
            candidates[rank].lineage = beams[candidates[rank].parent].lineage;
            candidates[rank].lineage.push_back(done * width + uint32_t(rank));
        }
        check((failed != 0) == expect_failure, expect_failure ? "a failure was missed" : "a failure that is none");
        check(out.count == candidates.size(), "count " + std::to_string(out.count) + " for " + std::to_string(candidates.size()));
        for (size_t rank = 0; rank < width; ++rank) {
            if (rank >= candidates.size()) {
                check(out.nodes[rank] == ~0u && out.tokens[rank] == ~0u && out.parents[rank] == ~0u,
                      "something beyond the beams alive");
                continue;
            }
            const Beam &beam = candidates[rank];
            const bool same = out.nodes[rank] == beam.node && out.tokens[rank] == beam.token &&
                              out.parents[rank] == beam.parent &&
                              __float_as_uint(out.scores[rank]) == __float_as_uint(beam.score) &&
                              std::equal(beam.lineage.begin(), beam.lineage.end(), out.lineage.begin() + rank * (done + 1));
            if (!same) {
                check(false, "step " + std::to_string(done) + " place " + std::to_string(rank) + " node " +
                                 std::to_string(out.nodes[rank]) + " for " + std::to_string(beam.node) + " score " +
                                 std::to_string(out.scores[rank]) + " for " + std::to_string(beam.score));
                break;
            }
        }
        beams = candidates;
        if (is_level()) level += 1;
        done += 1;
    }
};

uint64_t settled_at_once = 0, refined = 0, small = 0;

void launch(const std::vector<ExpandStep> &steps, unsigned blocks, unsigned refinements) {
    const unsigned requests = unsigned(steps.size());
    const ExpandStep *const device = steps.data();
    const emulation::Geometry many{dim3(blocks, requests), expand::THREADS};
    emulation::launch({requests, expand::BEGIN_THREADS}, expand::expand_begin, device);
    emulation::launch(many, expand::expand_normalize, device);
    emulation::launch(many, expand::expand_histogram, device, refinements);
    for (const ExpandStep &step : steps) (workspace_of(step).state->settled ? settled_at_once : refined) += 1;
    for (unsigned left = refinements; left-- > 0;) emulation::launch(many, expand::expand_refine, device, left);
    emulation::launch(many, expand::expand_collect, device);
    emulation::launch(many, expand::expand_finish, device);
}

void launch_small(const std::vector<ExpandStep> &steps) {
    small += steps.size();
    emulation::launch({unsigned(steps.size()), expand::THREADS}, expand::expand_small, steps.data());
}

// The rows of the branch step that follows, against the beams.
void check_rows(std::vector<Search *> &searches) {
    std::vector<BranchRows> requests;
    std::vector<std::vector<uint32_t>> pages(searches.size());
    uint32_t rows = 3, widest = 0;
    u64 lineage = 5;
    for (size_t at = 0; at < searches.size(); ++at) {
        const Search &s = *searches[at];
        for (uint32_t page = 0; page * 32 < s.width * s.done; ++page) pages[at].push_back(1000 + 7 * page + uint32_t(at));
        const Memory &m = *s.memory[s.done];
        requests.push_back({m.tokens.data(), m.lineage.data(), &m.count, pages[at].data(), s.width, s.done, 40, rows, lineage});
        rows += s.width, lineage += u64(s.width) * s.done, widest = std::max(widest, s.width);
    }
    std::vector<uint32_t> tokens(rows, 9), positions(rows, 9);
    std::vector<int32_t> slots(rows, 9), lineages(lineage, 9);
    const BranchRows *const device = requests.data();
    emulation::launch({dim3((widest + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK, unsigned(requests.size())), ROWS_PER_BLOCK},
                      branch_rows, device, tokens.data(), positions.data(), slots.data(), lineages.data());
    check(tokens[2] == 9 && lineages[4] == 9, "rows of others are left alone");
    for (size_t at = 0; at < searches.size(); ++at) {
        const Search &s = *searches[at];
        const BranchRows &request = requests[at];
        for (uint32_t row = 0; row < s.width; ++row) {
            const uint32_t place = request.first_row + row, own = (s.done - 1) * s.width + row;
            const bool alive = row < s.beams.size();
            const uint32_t token = s.beams.empty() ? 0 : s.beams[alive ? row : 0].token;
            const auto slot_of = [&](uint32_t branch_row) { return int32_t(pages[at][branch_row / 32] * 32 + branch_row % 32); };
            const int32_t slot = alive || row == 0 ? slot_of(own) : -1;
            check(tokens[place] == token && positions[place] == 40 + s.done - 1 && slots[place] == slot, "a branch row");
            for (uint32_t entry = 0; entry < s.done; ++entry) {
                const uint32_t expected = s.beams.empty() ? entry * s.width : s.beams[alive ? row : 0].lineage[entry];
                check(lineages[request.first_lineage + u64(row) * s.done + entry] == slot_of(expected),
                      "a lineage of a branch row");
            }
        }
    }
}

// Takes searches of equally many steps to their end, together.
void run(std::vector<Search *> searches, unsigned blocks, unsigned refinements) {
    for (Search *s : searches) s->begin();
    for (size_t step = 0; step < searches[0]->steps.size(); ++step) {
        std::vector<ExpandStep> steps;
        for (Search *s : searches) s->compute(), steps.push_back(s->step());
        bool is_small = below(3) == 0;
        for (const Search *s : searches) is_small &= s->most_children() <= expand::MOST_CANDIDATES;
        if (is_small) launch_small(steps);
        else launch(steps, blocks, refinements);
        for (size_t at = 0; at < searches.size(); ++at) searches[at]->advance(steps[at]);
        check_rows(searches);
    }
}

void random_searches() {
    const std::vector<std::vector<uint32_t>> shapes = {
        {1}, {300}, {2, 3}, {5, 5, 5}, {16, 16, 16}, {3, 200, 40}, {40, 2, 2, 2, 2, 2, 2, 2}, {700, 4}};
    for (int round = 0; round < 60; ++round) {
        std::vector<Catalog> catalogs;
        std::vector<std::unique_ptr<FilterArrays>> filters;
        std::vector<Search> searches;
        const size_t requests = 1 + below(3);
        catalogs.reserve(requests);
        const std::vector<uint32_t> &shape = shapes[below(uint32_t(shapes.size()))];
        for (size_t at = 0; at < requests; ++at) {
            catalogs.push_back(random_catalog(shape, 1 + below(2000), below(2)));
            filters.push_back(filter_of(catalogs.back().leaves, int(below(7)), below(2) ? 0.5 : 0.03));
            Search s{};
            s.catalog = &catalogs.back(), s.filter = filters.back().get();
            if (below(3) == 0) {
                filters.push_back(filter_of(catalogs.back().leaves, 0, 1.0));
                s.over = filters.back().get();
            }
            s.width = 1 + below(below(2) ? 8 : 200);
            s.capacity = s.width + (below(4) ? below(3) : below(300));
            s.full = below(2);
            s.logits = Logits(below(8));
            searches.push_back(std::move(s));
        }
        // Fixed tokens at the same places, so that all searches take equally many steps.
        const bool before = below(4) == 0, after = below(4) == 0;
        for (Search &s : searches) {
            if (before) s.steps.push_back(0);
            for (size_t level = 0; level < shape.size(); ++level) s.steps.push_back(-1);
            // The token that is never negative infinity: its normaliser would not be finite.
            if (after) s.steps.push_back(0);
        }
        label = "random round " + std::to_string(round);
        std::vector<Search *> pointers;
        for (Search &s : searches) pointers.push_back(&s);
        run(pointers, 1 + below(4), below(4));
    }
}

struct Case {
    const char *name;
    std::vector<uint32_t> codebooks;
    uint32_t items;
    bool skew;
    uint32_t width, capacity;
    Logits logits;
    int filter;
    double density;
};

void adversarial() {
    const Case cases[] = {
        {"a root of 8192 children", {8192}, 60000, false, 100, 4096, Logits::Gaussian, 0, 0},
        {"a root of 8192 children, all equal", {8192}, 60000, false, 100, 128, Logits::Equal, 0, 0},
        {"a root of 8192 children, three values, the last half allowed", {8192}, 60000, false, 1000, 1000, Logits::Few, 1, 0.5},
        {"one prefix holds half of the catalog", {64, 64, 4096}, 12000, true, 50, 2048, Logits::Gaussian, 3, 0.01},
        {"one prefix holds half of the catalog, all equal", {64, 64, 4096}, 12000, true, 50, 60, Logits::Equal, 2, 0.3},
        {"5000 beams", {5000, 4, 3}, 30000, false, 5000, 7000, Logits::Gaussian, 0, 0},
        {"5000 beams, all equal", {5000, 4, 3}, 30000, false, 5000, 5000, Logits::Equal, 0, 0},
        {"8192 beams", {8192, 3}, 20000, false, 8192, 8192, Logits::Bf16, 3, 0.05},
        {"scores in the last bin", {100, 100}, 8000, false, 300, 300, Logits::FarApart, 0, 0},
        {"scores of negative infinity", {100, 100}, 8000, false, 2000, 2000, Logits::SomeInfinite, 0, 0},
        {"fewer candidates than beams", {10, 10, 10}, 50, false, 700, 700, Logits::Gaussian, 0, 0},
        {"ten allowed items", {40, 40, 40}, 20000, false, 64, 2048, Logits::Increasing, 4, 0.0005},
        {"nothing allowed", {40, 40}, 900, false, 64, 64, Logits::Gaussian, 5, 0},
    };
    for (const Case &c : cases) {
        const Catalog catalog = random_catalog(c.codebooks, c.items, c.skew);
        const auto filter = filter_of(catalog.leaves, c.filter, c.density);
        for (unsigned variant = 0; variant < 2; ++variant) {
            Search s{};
            s.catalog = &catalog, s.filter = filter.get();
            s.width = c.width, s.capacity = c.capacity;
            s.full = variant == 0, s.logits = c.logits;
            s.steps.assign(c.codebooks.size(), -1);
            label = std::string(c.name) + (s.full ? ", full vocabulary" : ", allowed set");
            run({&s}, 3, variant == 0 ? 0 : 2);
        }
    }
}

// A forced prefix: the search begins below the root.
void from_a_prefix() {
    label = "from a prefix";
    const Catalog catalog = random_catalog({6, 6, 6}, 150, false);
    const auto filter = filter_of(catalog.leaves, 1, 0.7);
    for (uint32_t start = 0; start < 6; ++start) {
        Search s{};
        s.catalog = &catalog, s.filter = filter.get();
        s.width = 9, s.capacity = 16, s.full = true, s.logits = Logits::Few;
        s.level = 1, s.start = start, s.steps = {-1, -1};
        run({&s}, 2, 1);
    }
}

// A request that breaks fails alone, and stays failed.
void broken_logits() {
    const Catalog catalog = random_catalog({30, 30, 30}, 3000, false);
    const auto filter = filter_of(catalog.leaves, 3, 0.1);
    enum { NanLogit, InfiniteLogit, NanNormalizer, InfiniteNormalizer, AboveNormalizer, NanElsewhere, KINDS };
    for (int kind = 0; kind < KINDS; ++kind) {
        for (bool full : {true, false}) {
            if (!full && (kind == NanNormalizer || kind == InfiniteNormalizer || kind == AboveNormalizer)) continue;
            label = "broken logits " + std::to_string(kind) + (full ? " full" : " allowed");
            Search broken{}, sound{};
            for (Search *s : {&broken, &sound}) {
                s->catalog = &catalog, s->filter = filter.get();
                s->width = 20, s->capacity = 40, s->full = full, s->logits = Logits::Gaussian;
                s->steps = {-1, -1, -1};
                s->begin();
            }
            for (int step = 0; step < 3; ++step) {
                std::vector<ExpandStep> steps;
                for (Search *s : {&broken, &sound}) s->compute();
                if (step == 1) {
                    const size_t beam = broken.beams.size() / 2;
                    uint32_t first, last;
                    broken.children(broken.beams[beam].node, first, last);
                    while (!broken.allowed(first)) ++first;
                    float &logit = broken.logit(beam, catalog.levels[2].symbols[first]);
                    if (kind == NanLogit) logit = NOT_A_NUMBER;
                    if (kind == InfiniteLogit) logit = INFINITE;
                    if (kind == NanNormalizer) broken.normalizers[beam] = NOT_A_NUMBER;
                    if (kind == InfiniteNormalizer) broken.normalizers[beam] = INFINITE;
                    if (kind == AboveNormalizer) broken.normalizers[beam] = std::nextafter(logit, -INFINITE);
                    broken.expect_failure = kind != NanElsewhere;
                    if (kind == NanElsewhere) {
                        // A token that is no allowed child of the beam.
                        std::set<uint32_t> used;
                        for (uint32_t child = first; child < last; ++child) {
                            if (broken.allowed(child)) used.insert(catalog.levels[2].symbols[child]);
                        }
                        for (uint32_t code = 0; code < catalog.tokens; ++code) {
                            if (!used.count(catalog.first_token + code))
                                broken.logit(beam, catalog.first_token + code) = NOT_A_NUMBER;
                        }
                    }
                }
                for (Search *s : {&broken, &sound}) steps.push_back(s->step());
                if (below(2)) launch(steps, 2, 1);
                else launch_small(steps);
                broken.advance(steps[0]), sound.advance(steps[1]);
            }
            check(sound.beams.size() == 20, "the other request goes on");
        }
    }
}

// What the host promised and did not keep makes a request fail.
void too_many() {
    label = "too many";
    const Catalog catalog = random_catalog({2049, 2}, 40000, false);
    const auto filter = filter_of(catalog.leaves, 0, 0);
    for (uint32_t width : {100u, 3000u}) {
        Search s{};
        s.catalog = &catalog, s.filter = filter.get();
        s.width = width, s.capacity = 5000, s.full = true, s.logits = Logits::Gaussian, s.steps = {-1, -1};
        s.begin();
        // The root has one child too many; and, in the second step, there are too many beams.
        for (int step = 0; step < 2; ++step) {
            s.compute();
            const std::vector<ExpandStep> steps = {s.step()};
            s.expect_failure = width == 100 || step == 1;
            if (s.expect_failure) launch_small(steps);
            else launch(steps, 2, 0);
            s.advance(steps[0]);
            if (width == 100) break;
        }
    }
}

void layout() {
    check(
        expand_workspace_bytes(5000, 12000) ==
            [] {
                ExpandStep step{};
                step.width = 5000, step.capacity = 12000;
                const Workspace w = workspace_of(step);
                return u64(reinterpret_cast<uintptr_t>(w.keys + 12000));
            }(),
        "the size of a workspace");
    for (float best : {0.0f, -3.7f, -500.0f}) {
        uint32_t before = 0;
        for (uint32_t rank = ordered(__float_as_uint(best)); rank > LOWEST_SCORE; rank -= std::min(rank - LOWEST_SCORE, 4001u)) {
            const uint32_t bin = bin_of(best, __uint_as_float(unordered(rank)));
            check(bin >= before && bin < BINS, "bins are in the order of scores");
            before = bin;
        }
        check(bin_of(best, best) == 0 && before == BINS - 1, "the first bin and the last");
    }
}

}  // namespace

int main() {
    try {
        layout();
        for (auto schedule : {emulation::Schedule::Forward, emulation::Schedule::Backward, emulation::Schedule::Shuffled}) {
            emulation::options().schedule = schedule;
            random_searches();
        }
        emulation::options().schedule = emulation::Schedule::Forward;
        adversarial();
        from_a_prefix();
        broken_logits();
        too_many();
    } catch (const emulation::Error &error) {
        check(false, error.what());
    }
    label = "all of it";
    check(settled_at_once > 100 && refined > 50 && small > 100, "all ways to the result were taken");
    if (failures == 0) std::printf("expand: passed\n");
    return failures != 0;
}
