// Prefill and branch attention, run on the CPU, against attention in double precision and against themselves.
//
// What is promised:
//   * closeness: with u = 2^-8 (bf16 rounds to within u), weights w and values v, the weights are rounded (u in the sum of w v and in that
//   of w) and
//     so is the result: |error| <= 3 u sum(w |v|) / sum(w), and 1 % more for everything that is done in f32;
//   * the same bits for a row, whatever shares its tile or launch, however its context was cut, whichever kernel runs it;
//   * nothing is read that belongs to nobody: rows behind a context, unused pages, unused partial rows and shared memory are NaN;
//   * ldmatrix meets no bank conflict.
// The order of threads and blocks changes from launch to launch.
//
// Prints "attention: passed" and returns 0, or says what is wrong and returns 1.
#include "../branch_attention.cu"
#include "../prefill_attention.cu"

namespace {

constexpr double UNIT = 1.0 / 256;

int failures = 0;
double worst = 0, error_squares = 0, result_squares = 0;

void fail(const char *what, const char *shape, double detail) {
    if (failures++ < 20) std::printf("attention: %s (%s): %g\n", what, shape, detail);
}

std::mt19937 random_engine(20260101);
int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_engine); }
float random_normal() { return std::normal_distribution<float>()(random_engine); }

bf16 rounded(float value) { return __float2bfloat16_rn(value); }
const bf16 NOBODYS = __ushort_as_bfloat16(0xffff);

// Every launch with another order of threads and blocks.
template <class... Parameters, class... Arguments>
void run(dim3 grid, int dynamic_shared, void (*kernel)(Parameters...), Arguments... arguments) {
    auto &options = emulation::options();
    options.schedule = emulation::Schedule(random_int(0, 2));
    options.seed = unsigned(random_int(0, 1 << 30));
    emulation::launch({grid, THREADS, std::size_t(dynamic_shared)}, kernel, arguments...);
}

template <int D> struct Kernels;
#define KERNELS(D)                                                                                                                         \
    template <> struct Kernels<D> {                                                                                                        \
        static constexpr auto prefill = prefill_attention_##D, prefill_few = prefill_attention_few_##D;                                    \
        static constexpr auto branch = branch_attention_##D, branch_few = branch_attention_few_##D;                                        \
        static constexpr auto merge = branch_merge_##D;                                                                                    \
    };
KERNELS(16)
KERNELS(32)
KERNELS(64)
KERNELS(128)
KERNELS(256)

// Heads, and the pages of a layer. A page is handed out once; what was not written is NaN.
struct Layer {
    int D, head_dim, kv_heads, group, q_heads;
    float scale;
    std::vector<bf16> keys, values;
    std::vector<int> free_pages;
    char shape[96];

    Layer(int D, int head_dim, int kv_heads, int group, int pages)
        : D(D), head_dim(head_dim), kv_heads(kv_heads), group(group), q_heads(kv_heads * group),
          scale(float(1.4426950408889634 / std::sqrt(double(head_dim)))), keys(std::size_t(pages) * kv_heads * PAGE * D, NOBODYS),
          values(keys) {
        for (int page = 0; page < pages; ++page) free_pages.push_back(page);
        std::shuffle(free_pages.begin(), free_pages.end(), random_engine);
        std::snprintf(shape, sizeof shape, "D %d, head_dim %d, kv heads %d, group %d", D, head_dim, kv_heads, group);
    }

    std::size_t place(int page, int kv_head, int offset) const { return ((std::size_t(page) * kv_heads + kv_head) * PAGE + offset) * D; }

    int take_page() {
        const int page = free_pages.back();
        free_pages.pop_back();
        return page;
    }

    void write(int page, int offset, bool somebodys) {
        for (int head = 0; head < kv_heads; ++head) {
            for (int column = 0; column < D; ++column) {
                const std::size_t at = place(page, head, offset) + column;
                keys[at] = !somebodys ? NOBODYS : rounded(column < head_dim ? random_normal() : 0.0f);
                values[at] = !somebodys ? NOBODYS : rounded(column < head_dim ? random_normal() : 0.0f);
            }
        }
    }

    // Queries of `rows` rows; some are sharp, so that few keys matter, or so sharp that weights under- and overflow without a maximum.
    std::vector<bf16> make_queries(int rows) const {
        std::vector<bf16> queries(std::size_t(rows) * q_heads * D);
        for (std::size_t at = 0; at < queries.size(); ++at) {
            const float sharpness = at / D % 3 == 0 ? 4.0f : at / D % 5 == 0 ? 40.0f : 1.0f;
            queries[at] = rounded(int(at % D) < head_dim ? sharpness * random_normal() : 0.0f);
        }
        return queries;
    }

    // One head of one row over the given places of keys, against `out`.
    void compare(const bf16 *query, const bf16 *out, const std::vector<std::size_t> &places) const {
        std::vector<double> logits;
        double maximum = -INFINITY;
        for (std::size_t at : places) {
            double logit = 0;
            for (int column = 0; column < head_dim; ++column)
                logit += double(__bfloat162float(query[column])) * __bfloat162float(keys[at + column]);
            logits.push_back(logit / std::sqrt(double(head_dim)));
            maximum = std::max(maximum, logits.back());
        }
        for (int column = 0; column < head_dim; ++column) {
            double total = 0, sum = 0, size = 0;
            for (std::size_t at = 0; at < places.size(); ++at) {
                const double weight = std::exp(logits[at] - maximum), value = __bfloat162float(values[places[at] + column]);
                total += weight, sum += weight * value, size += weight * std::fabs(value);
            }
            const double error = std::fabs(sum / total - __bfloat162float(out[column])), bound = 3.03 * UNIT * size / total;
            if (!(error <= bound)) fail("a result is too far from that in double precision", shape, error / bound);
            worst = std::max(worst, error / bound);
            error_squares += error * error, result_squares += sum / total * (sum / total);
        }
    }
};

template <int D, bool few> constexpr int bytes() {
    if constexpr (few) {
        return by_keys_bytes<Sizes<D>>;
    } else {
        return by_rows_bytes<Sizes<D>>;
    }
}

bool same_bits(const bf16 *one, const bf16 *other, std::size_t count) { return std::memcmp(one, other, count * sizeof(bf16)) == 0; }

// ---------------------------------------------------------------------------------------------------------------------------------------
// Prefill
// ---------------------------------------------------------------------------------------------------------------------------------------

struct ContextRows {
    int len, table;
    std::vector<bf16> queries, expected;
};

// Runs rows [first, last) of some contexts in one launch and returns their outputs, row after row.
struct Part {
    const ContextRows *context;
    int first, last;
};
template <int D, bool few>
std::vector<bf16> prefill_parts(const Layer &layer, const std::vector<int> &page_tables, const std::vector<Part> &parts, int tile_rows) {
    constexpr int capacity = few ? FEW_QUERIES : Sizes<D>::QUERIES;
    const int width = layer.q_heads * D, out_width = layer.q_heads * layer.head_dim;
    std::vector<bf16> queries;
    std::vector<std::array<int, 4>> tiles;
    int row = 0;
    for (const Part &part : parts) {
        queries.insert(queries.end(), part.context->queries.begin() + std::size_t(part.first) * width,
            part.context->queries.begin() + std::size_t(part.last) * width);
        for (int first = part.first; first < part.last;) {
            const int most = std::min({part.last - first, capacity / layer.group, tile_rows});
            const int rows = tile_rows < 1000 ? random_int(1, most) : most;
            tiles.push_back({row, rows, first, part.context->table});
            row += rows, first += rows;
        }
    }
    std::shuffle(tiles.begin(), tiles.end(), random_engine);
    std::vector<bf16> out(std::size_t(row) * out_width, NOBODYS);
    const auto kernel = few ? Kernels<D>::prefill_few : Kernels<D>::prefill;
    run(dim3(unsigned(tiles.size()), unsigned(layer.kv_heads)), bytes<D, few>(), kernel, queries.data(), layer.keys.data(),
        layer.values.data(), tiles.data()->data(), page_tables.data(), out.data(), layer.q_heads, layer.kv_heads, layer.head_dim,
        layer.scale);
    return out;
}

template <int D> void prefill_case(int head_dim, int kv_heads, int group, int contexts, int longest) {
    Layer layer(D, head_dim, kv_heads, group, contexts * (longest / PAGE + 1) + 3);
    const int out_width = layer.q_heads * head_dim;
    std::vector<int> page_tables{-1};
    std::vector<ContextRows> all;
    std::vector<Part> whole;
    for (int at = 0; at < contexts; ++at) {
        // Ends around borders of pages and tiles, and anywhere.
        const int len = at == 0 ? longest : at == 1 ? 32 * random_int(1, 3) + random_int(-1, 1) : random_int(1, longest);
        ContextRows context{len, int(page_tables.size()), {}, {}};
        for (int position = 0; position < len; ++position) {
            if (position % PAGE == 0) page_tables.push_back(layer.take_page());
            layer.write(page_tables.back(), position % PAGE, true);
        }
        context.queries = layer.make_queries(len);
        all.push_back(std::move(context));
    }
    for (const ContextRows &context : all) whole.push_back({&context, 0, context.len});
    const std::vector<bf16> out = prefill_parts<D, false>(layer, page_tables, whole, 1000);
    std::size_t row = 0;
    for (ContextRows &context : all) {
        context.expected.assign(
            out.begin() + std::ptrdiff_t(row * out_width), out.begin() + std::ptrdiff_t((row + context.len) * out_width));
        row += context.len;
        std::vector<std::size_t> places;
        for (int position = 0; position < context.len; ++position) {
            for (int head = 0; head < layer.q_heads; ++head) {
                places.clear();
                for (int key = 0; key <= position; ++key)
                    places.push_back(layer.place(page_tables[context.table + key / PAGE], head / group, key % PAGE));
                // The reference is slow: all rows near borders, some of the others.
                if (position % PAGE > 1 && position % PAGE < PAGE - 1 && position % 7 && position + 2 < context.len) continue;
                layer.compare(&context.queries[(std::size_t(position) * layer.q_heads + head) * D],
                    &context.expected[(std::size_t(position) * layer.q_heads + head) * head_dim], places);
            }
        }
    }
    // Some rows of each context, cut anew; what comes after them is not there yet.
    for (int trial = 0; trial < 3; ++trial) {
        std::vector<Part> parts;
        Layer young = layer;
        for (const ContextRows &context : all) {
            const int first = random_int(0, context.len - 1),
                      last = trial == 0 ? std::min(context.len, first + 3) : random_int(first + 1, context.len);
            parts.push_back({&context, first, last});
            for (int position = last; position < context.len; ++position)
                young.write(page_tables[context.table + position / PAGE], position % PAGE, false);
        }
        std::shuffle(parts.begin(), parts.end(), random_engine);
        std::vector<int> tables = page_tables;
        for (const Part &part : parts) {
            for (int page = (part.last + PAGE - 1) / PAGE; page < (part.context->len + PAGE - 1) / PAGE; ++page)
                tables[part.context->table + page] = -1;
        }
        const bool few = trial != 1;
        const std::vector<bf16> again =
            few ? prefill_parts<D, true>(young, tables, parts, 64) : prefill_parts<D, false>(young, tables, parts, 64);
        std::size_t at = 0;
        for (const Part &part : parts) {
            const std::size_t count = std::size_t(part.last - part.first) * out_width;
            if (!same_bits(&again[at], &part.context->expected[std::size_t(part.first) * out_width], count)) {
                fail(few ? "prefill_few differs from prefill" : "prefill depends on how a context is cut", layer.shape, part.first);
            }
            at += count;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Branches
// ---------------------------------------------------------------------------------------------------------------------------------------

struct Beams {
    int context_len, table, beams, depth, split;
    std::vector<int> lineage;
    std::vector<bf16> queries, expected;
};

template <int D, bool few>
std::vector<bf16> branch_parts(
    const Layer &layer, const std::vector<int> &page_tables, const std::vector<const Beams *> &requests, bool cut) {
    constexpr int capacity = few ? FEW_QUERIES : Sizes<D>::QUERIES;
    std::vector<bf16> queries;
    std::vector<std::array<int, 6>> items, rows;
    std::vector<int> lineage{-1};
    int row = 0, partial = 1;
    for (const Beams *request : requests) {
        queries.insert(queries.end(), request->queries.begin(), request->queries.end());
        const int splits = (request->context_len + request->split - 1) / request->split;
        for (int first = 0; first < request->beams;) {
            const int most = std::min(request->beams - first, capacity / layer.group), count = cut ? random_int(1, most) : most;
            for (int split = 0; split < splits; ++split) {
                items.push_back({row + first, count, request->table, split * request->split,
                    std::min(request->context_len, (split + 1) * request->split), partial + split * request->beams + first});
            }
            first += count;
        }
        for (int beam = 0; beam < request->beams; ++beam) {
            rows.push_back(
                {row + beam, partial + beam, splits, request->beams, int(lineage.size()) + beam * request->depth, request->depth});
        }
        lineage.insert(lineage.end(), request->lineage.begin(), request->lineage.end());
        row += request->beams, partial += splits * request->beams + 1;
    }
    std::shuffle(items.begin(), items.end(), random_engine);
    std::shuffle(rows.begin(), rows.end(), random_engine);
    std::vector<float> partial_out(std::size_t(partial) * layer.q_heads * D, NAN),
        partial_state(std::size_t(partial) * layer.q_heads * 2, NAN);
    std::vector<bf16> out(std::size_t(row) * layer.q_heads * layer.head_dim, NOBODYS);
    const auto kernel = few ? Kernels<D>::branch_few : Kernels<D>::branch;
    if (!items.empty()) {
        run(dim3(unsigned(items.size()), unsigned(layer.kv_heads)), bytes<D, few>(), kernel, queries.data(), layer.keys.data(),
            layer.values.data(), items.data()->data(), page_tables.data(), partial_out.data(), partial_state.data(), layer.q_heads,
            layer.kv_heads, layer.scale);
    }
    run(dim3(unsigned(rows.size()), unsigned((layer.q_heads + WARPS - 1) / WARPS)), 0, Kernels<D>::merge, queries.data(), layer.keys.data(),
        layer.values.data(), partial_out.data(), partial_state.data(), rows.data()->data(), lineage.data(), out.data(), layer.q_heads,
        layer.kv_heads, layer.head_dim, layer.scale);
    return out;
}

template <int D> void branch_case(int head_dim, int kv_heads, int group, int requests, int longest, int most_beams) {
    Layer layer(D, head_dim, kv_heads, group, requests * (longest / PAGE + 1 + most_beams * 4 / PAGE + 1) + 3);
    const int out_width = layer.q_heads * head_dim;
    std::vector<int> page_tables{-1};
    std::vector<Beams> all;
    for (int at = 0; at < requests; ++at) {
        Beams request{};
        request.context_len = at == 0 ? 0 : at == 1 ? 64 * random_int(1, 2) + random_int(-1, 1) : random_int(1, longest);
        request.table = int(page_tables.size());
        request.beams = at == 2 ? most_beams : random_int(1, at == 1 ? 6 : most_beams);
        // No step before, a deep tree up to what a warp has lanes for, and what is usual.
        request.depth = at == 0 ? 1 : at == 1 ? random_int(5, 32) : random_int(1, 4);
        request.split = SPLIT_UNIT * random_int(1, 3);
        for (int position = 0; position < request.context_len; ++position) {
            if (position % PAGE == 0) page_tables.push_back(layer.take_page());
            layer.write(page_tables.back(), position % PAGE, true);
        }
        std::vector<int> branch_rows;
        for (int row = 0, page = 0; row < request.beams * request.depth; ++row) {
            if (row % PAGE == 0) page = layer.take_page();
            layer.write(page, row % PAGE, true);
            branch_rows.push_back(page * PAGE + row % PAGE);
        }
        // Ancestors of earlier steps at random, the row itself last.
        for (int beam = 0; beam < request.beams; ++beam) {
            for (int step = 0; step < request.depth; ++step) {
                const int parent = step + 1 == request.depth ? beam : random_int(0, request.beams - 1);
                request.lineage.push_back(branch_rows[std::size_t(step) * request.beams + parent]);
            }
        }
        request.queries = layer.make_queries(request.beams);
        all.push_back(std::move(request));
    }
    std::vector<const Beams *> together;
    for (const Beams &request : all) together.push_back(&request);
    const std::vector<bf16> out = branch_parts<D, false>(layer, page_tables, together, false);
    std::size_t row = 0;
    for (Beams &request : all) {
        request.expected.assign(
            out.begin() + std::ptrdiff_t(row * out_width), out.begin() + std::ptrdiff_t((row + request.beams) * out_width));
        row += request.beams;
        for (int beam = 0; beam < request.beams; ++beam) {
            for (int head = 0; head < layer.q_heads; ++head) {
                std::vector<std::size_t> places;
                for (int key = 0; key < request.context_len; ++key)
                    places.push_back(layer.place(page_tables[request.table + key / PAGE], head / group, key % PAGE));
                for (int step = 0; step < request.depth; ++step) {
                    const int ancestor = request.lineage[std::size_t(beam) * request.depth + step];
                    places.push_back(layer.place(ancestor / PAGE, head / group, ancestor % PAGE));
                }
                layer.compare(&request.queries[(std::size_t(beam) * layer.q_heads + head) * D],
                    &request.expected[(std::size_t(beam) * layer.q_heads + head) * head_dim], places);
            }
        }
    }
    // Alone, with other neighbours in a tile, and by the other kernel.
    for (int trial = 0; trial < 3; ++trial) {
        std::vector<const Beams *> some = together;
        std::shuffle(some.begin(), some.end(), random_engine);
        if (trial == 0) some.resize(1);
        const std::vector<bf16> again = trial == 1 ? branch_parts<D, true>(layer, page_tables, some, random_int(0, 1))
                                                   : branch_parts<D, false>(layer, page_tables, some, trial == 2);
        std::size_t at = 0;
        for (const Beams *request : some) {
            if (!same_bits(&again[at], request->expected.data(), request->expected.size())) {
                fail(trial == 1 ? "branch_few differs from branch" : "a branch row depends on what shares its launch", layer.shape,
                    request->beams);
            }
            at += request->expected.size();
        }
    }
}

template <int D> void sizes(int head_dim) {
    for (int group : {1, 2, 4, 7}) {
        prefill_case<D>(head_dim, random_int(1, 2), group, 3, D >= 128 ? 150 : 300);
        branch_case<D>(head_dim, random_int(1, 2), group, 3, D >= 128 ? 150 : 300, D >= 128 ? 40 : 70);
    }
}

} // namespace

int main() {
    try {
        sizes<16>(8);
        sizes<16>(12);
        sizes<32>(32);
        sizes<64>(64);
        sizes<128>(128);
        prefill_case<256>(256, 1, 2, 3, 100);
        branch_case<256>(256, 1, 2, 3, 100, 40);
        prefill_case<256>(160, 1, 3, 2, 70);
    } catch (const emulation::Error &error) {
        std::printf("attention: %s\n", error.what());
        return 1;
    }
    const auto &counters = emulation::counters();
    if (counters.bank_conflicts) fail("ldmatrix met bank conflicts", "all", double(counters.bank_conflicts));
    const double relative = std::sqrt(error_squares / result_squares);
    // The result alone is rounded to within u, on average to u / sqrt(12) or a little less.
    if (!(relative < 0.6 * UNIT)) fail("the root mean square of the errors is too large", "all", relative / UNIT);
    std::printf("attention: worst error %.2f of its bound, root mean square %.2f u, %llu mma\n", worst, relative / UNIT,
        static_cast<unsigned long long>(counters.mma));
    if (failures == 0) std::printf("attention: passed\n");
    return failures != 0;
}
