// Kernels that do one row at a time, against double precision: log-sum-exp, norms, rotary positions and pages, gates, embeddings.
//
// Prints "rows: passed" and returns 0, or says what is wrong and returns 1.
//
// Results in bf16 may be off by the rounding of a value that lies between two: one unit in the last place, 2^-8 of the value.
// What is a copy must be equal. A row must have the same bits whatever the other rows of the launch.
#include "../embed.cu"
#include "../gate.cu"
#include "../log_sum_exp.cu"
#include "../norm.cu"
#include "../rotary_store.cu"

namespace {

int failures = 0;
std::string label;

void check(bool condition, const std::string &what) {
    if (!condition && failures < 20) std::printf("rows: %s: %s\n", label.c_str(), what.c_str());
    failures += !condition;
}

std::mt19937 random_bits(7);
uint32_t below(uint32_t limit) { return random_bits() % limit; }
float uniform() { return float(int(random_bits() >> 8) - (1 << 23)) / float(1 << 23); }

// Memory aligned as that of a device is; what lies around it is for AddressSanitizer to watch.
template <class T>
struct Array {
    T *data;
    size_t size;
    explicit Array(size_t size)
        : data(static_cast<T *>(std::aligned_alloc(16, (size * sizeof(T) + 15) / 16 * 16 + 16))), size(size) {
        std::memset(data, 0xff, size * sizeof(T));
    }
    ~Array() { std::free(data); }
    Array(const Array &) = delete;
    T &operator[](size_t at) { return data[at]; }
};

void fill(Array<float> &array, float scale) {
    for (size_t at = 0; at < array.size; ++at) array[at] = scale * uniform();
}
void fill(Array<bf16> &array, float scale) {
    for (size_t at = 0; at < array.size; ++at) array[at] = __float2bfloat16(scale * uniform());
}
bool is_untouched(bf16 value) { return __bfloat16_as_ushort(value) == 0xffff; }
bool near_bf16(bf16 value, double truth) {
    return std::abs(__bfloat162float(value) - truth) <= std::abs(truth) * (1.0 / 256) * 1.01 + 1e-30;
}
bool is_rounded(bf16 value, float truth) { return __bfloat16_as_ushort(value) == __bfloat16_as_ushort(__float2bfloat16(truth)); }
template <class T>
bool same(const T *a, const T *b, size_t count) {
    return std::memcmp(a, b, count * sizeof(T)) == 0;
}

// ---------------------------------------------------------------------------------------------------------------------

template <class Logit, class Kernel>
void one_log_sum_exp(Kernel kernel, uint32_t rows, uint32_t columns, size_t stride, float scale) {
    const uint32_t chunks = (columns + log_sum_exp::CHUNK - 1) / log_sum_exp::CHUNK;
    Array<Logit> logits(rows * stride);
    for (size_t at = 0; at < rows * stride; ++at) {
        const uint32_t bits = __float_as_uint(scale * uniform());
        if constexpr (sizeof(Logit) == 2) logits[at] = uint16_t(bits >> 16);
        else logits[at] = __uint_as_float(bits);
    }
    const auto value = [&](size_t at) {
        if constexpr (sizeof(Logit) == 2) return __uint_as_float(uint32_t(logits[at]) << 16);
        else return logits[at];
    };
    // The last row is the first one again.
    for (uint32_t column = 0; column < columns; ++column) logits[(rows - 1) * stride + column] = logits[column];
    const uint32_t kept_first = below(columns), kept_count = 1 + below(columns - kept_first);
    Array<float> out(rows), kept(size_t(rows) * kept_count);
    Array<float2> partial(rows * chunks);
    Array<uint32_t> arrived(rows);
    std::memset(arrived.data, 0, rows * 4);
    for (int launch = 0; launch < 2; ++launch) {
        emulation::launch({dim3(rows, chunks), log_sum_exp::THREADS}, kernel, logits.data, u64(stride), columns, out.data,
                          launch == 0 ? kept.data : nullptr, kept_first, kept_count, chunks > 1 ? partial.data : nullptr,
                          arrived.data);
        for (uint32_t row = 0; row < rows; ++row) {
            double max = -std::numeric_limits<double>::infinity(), sum = 0;
            for (uint32_t column = 0; column < columns; ++column) max = std::max(max, double(value(row * stride + column)));
            for (uint32_t column = 0; column < columns; ++column) sum += std::exp(value(row * stride + column) - max);
            const double truth = max + std::log(sum);
            check(std::abs(out[row] - truth) <= 2e-6 * std::max(1.0, std::abs(truth)),
                  "is " + std::to_string(out[row]) + " for " + std::to_string(truth));
            check(out[row] >= max, "not below any logit");
            for (uint32_t column = 0; column < kept_count; ++column) {
                check(kept[row * kept_count + column] == value(row * stride + kept_first + column), "a column that is kept");
            }
        }
        check(same(&out[0], &out[rows - 1], 1), "equal rows have equal results");
    }
    // One bad value makes its row not a number, wherever it lies, and no other.
    for (uint32_t bits : {0x7fc00000u, 0x7f800000u, 0xff800000u}) {
        const size_t at = below(columns);
        if constexpr (sizeof(Logit) == 2) logits[at] = uint16_t(bits >> 16);
        else logits[at] = __uint_as_float(bits);
        emulation::launch({dim3(rows, chunks), log_sum_exp::THREADS}, kernel, logits.data, u64(stride), columns, out.data,
                          static_cast<float *>(nullptr), 0u, 0u, partial.data, arrived.data);
        check(std::isnan(out[0]), "a row with a value that is not finite");
        for (uint32_t row = 1; row < rows; ++row) check(std::isfinite(out[row]), "rows beside it");
        logits[at] = logits[(rows - 1) * stride + at];
    }
}

void log_sum_exps() {
    for (uint32_t columns : {1u, 2u, 7u, 100u, 1000u, 8191u, 8192u, 8193u, 20001u, 50000u}) {
        for (size_t extra : {0, 1, 4}) {
            for (float scale : {0.0f, 1.0f, 30.0f, 3000.0f}) {
                label = "log-sum-exp of " + std::to_string(columns) + " columns, stride + " + std::to_string(extra);
                one_log_sum_exp<float>(log_sum_exp::log_sum_exp_f32, 2 + below(2), columns, columns + extra, scale);
                if (extra != 1) one_log_sum_exp<uint16_t>(log_sum_exp::log_sum_exp_bf16, 2, columns, columns + extra, scale);
            }
        }
    }
    label = "log-sum-exp of 1048576 columns";
    one_log_sum_exp<float>(log_sum_exp::log_sum_exp_f32, 2, 1 << 20, 1 << 20, 10);
}

// ---------------------------------------------------------------------------------------------------------------------

unsigned norm_threads(int width) { return std::min(1024, (width + 255) / 256 * 32); }

void norms() {
    for (int width : {1, 8, 31, 32, 40, 48, 64, 100, 255, 256, 1000, 1024, 5120, 9000, 16384}) {
        label = "norm of " + std::to_string(width);
        const uint32_t rows = 3, before = 7;
        // Large enough to matter.
        const float epsilon = 0.5f;
        Array<float> residual(size_t(before) * width), bias(width), weight(width), residual_out(size_t(rows) * width);
        Array<bf16> delta(size_t(rows) * width), out(size_t(rows) * width);
        fill(residual, 3), fill(bias, 1), fill(weight, 2), fill(delta, 1);
        Array<uint32_t> index(rows);
        for (uint32_t row = 0; row < rows; ++row) index[row] = below(before);
        for (int variant = 0; variant < 16; ++variant) {
            const bool gathers = variant & 1, adds = variant & 2, biased = variant & 4, keeps = variant & 8;
            emulation::launch({rows, norm_threads(width)}, residual_rms_norm, residual.data, gathers ? index.data : nullptr,
                              adds ? delta.data : nullptr, biased ? bias.data : nullptr, weight.data,
                              keeps ? residual_out.data : nullptr, out.data, width, epsilon);
            for (uint32_t row = 0; row < rows; ++row) {
                const float *const from = &residual[size_t(gathers ? index[row] : row) * width];
                std::vector<float> sum(width);
                double squares = 0;
                for (int column = 0; column < width; ++column) {
                    const size_t at = size_t(row) * width + column;
                    sum[column] = from[column];
                    if (adds) sum[column] += __bfloat162float(delta[at]);
                    if (biased) sum[column] += bias[column];
                    squares += double(sum[column]) * sum[column];
                    if (keeps) check(residual_out[at] == sum[column], "the residual stream");
                }
                const double scale = 1 / std::sqrt(squares / width + epsilon);
                for (int column = 0; column < width; ++column) {
                    check(near_bf16(out[size_t(row) * width + column], sum[column] * scale * weight[column]), "a value");
                }
            }
        }
        // In place, and a row alone.
        Array<bf16> again(size_t(rows) * width);
        emulation::launch({rows, norm_threads(width)}, residual_rms_norm, residual.data, static_cast<uint32_t *>(nullptr),
                          delta.data, bias.data, weight.data, residual_out.data, out.data, width, epsilon);
        std::vector<float> second(&residual[width], &residual[2 * width]);
        emulation::launch({rows, norm_threads(width)}, residual_rms_norm, residual.data, static_cast<uint32_t *>(nullptr),
                          delta.data, bias.data, weight.data, residual.data, again.data, width, epsilon);
        const size_t all = size_t(rows) * width;
        check(same(&again[0], &out[0], all) && same(&residual[0], &residual_out[0], all), "in place");
        Array<float> alone(width);
        std::memcpy(alone.data, second.data(), width * 4);
        Array<bf16> alone_delta(width), alone_out(width);
        std::memcpy(alone_delta.data, &delta[width], width * 2);
        emulation::launch({1, norm_threads(width)}, residual_rms_norm, alone.data, static_cast<uint32_t *>(nullptr),
                          alone_delta.data, bias.data, weight.data, alone.data, alone_out.data, width, epsilon);
        check(same(&alone[0], &residual[width], width) && same(&alone_out[0], &again[width], width), "a row alone");
    }
}

void embeddings() {
    for (int width : {5, 8, 40, 48, 1000}) {
        label = "embedding of " + std::to_string(width);
        const uint32_t rows = 4, vocabulary = 9;
        Array<bf16> table(vocabulary * width), out(rows * width);
        Array<float> weight(width), residual(rows * width);
        Array<uint32_t> tokens(rows);
        fill(table, 2), fill(weight, 1);
        tokens[0] = 8, tokens[1] = 0, tokens[2] = 3, tokens[3] = 9;
        emulation::launch({rows, norm_threads(width)}, embed_rms_norm, tokens.data, table.data, weight.data, residual.data,
                          out.data, vocabulary, width, 0.5f);
        for (uint32_t row = 0; row < rows; ++row) {
            double squares = 0;
            const auto value = [&](int column) {
                return tokens[row] < vocabulary ? __bfloat162float(table[tokens[row] * width + column]) : 0.0f;
            };
            for (int column = 0; column < width; ++column) squares += double(value(column)) * value(column);
            for (int column = 0; column < width; ++column) {
                check(residual[row * width + column] == value(column), "an embedding");
                check(near_bf16(out[row * width + column], value(column) / std::sqrt(squares / width + 0.5f) * weight[column]),
                      "its norm");
            }
        }
        for (uint32_t bytes : {2u, 6u, 16u, 80u}) {
            Array<unsigned char> from(9 * bytes), to(rows * bytes);
            for (size_t at = 0; at < from.size; ++at) from[at] = static_cast<unsigned char>(random_bits());
            tokens[3] = 1;
            const uint32_t words = bytes % 16 == 0 ? bytes / 16 : bytes / 2;
            emulation::launch({(rows * words + 255) / 256, gather::THREADS}, gather_rows, static_cast<const void *>(from.data),
                              tokens.data, static_cast<void *>(to.data), rows, bytes);
            for (uint32_t row = 0; row < rows; ++row)
                check(same(&to[row * bytes], &from[tokens[row] * bytes], bytes), "a row that was gathered");
        }
    }
}

void gates() {
    for (int inner : {1, 8, 88, 100, 112, 1000}) {
        label = "gate of " + std::to_string(inner);
        const uint32_t rows = 3;
        Array<bf16> gate_up(rows * 2 * inner), out(rows * inner);
        Array<float> bias(2 * inner);
        fill(gate_up, 6), fill(bias, 1);
        if (inner >= 8)
            gate_up[0] = __float2bfloat16(-1e30f), gate_up[1] = __float2bfloat16(1e30f), gate_up[2] = __float2bfloat16(0.0f);
        for (bool biased : {false, true}) {
            emulation::launch({unsigned(rows * ((inner + 7) / 8) + 255) / 256, gate::THREADS}, silu_gate, gate_up.data,
                              biased ? bias.data : nullptr, out.data, rows, inner);
            for (uint32_t row = 0; row < rows; ++row) {
                for (int column = 0; column < inner; ++column) {
                    const float gate = __bfloat162float(gate_up[row * 2 * inner + column]) + (biased ? bias[column] : 0.0f);
                    const float up =
                        __bfloat162float(gate_up[row * 2 * inner + inner + column]) + (biased ? bias[inner + column] : 0.0f);
                    check(near_bf16(out[row * inner + column], gate / (1 + std::exp(-double(gate))) * up), "a value");
                }
            }
        }
    }
}

void rotary_positions() {
    struct Shape {
        int head_dim, padded_dim;
    };
    for (Shape shape : {Shape{2, 16},
                        {6, 16},
                        {8, 16},
                        {12, 16},
                        {16, 16},
                        {40, 48},
                        {64, 64},
                        {80, 128},
                        {128, 128},
                        {130, 144},
                        {200, 256},
                        {256, 256}}) {
        const int head_dim = shape.head_dim, padded_dim = shape.padded_dim, half = head_dim / 2, q_heads = 3, kv_heads = 2,
                  heads = q_heads + 2 * kv_heads;
        label = "heads of " + std::to_string(head_dim);
        const uint32_t rows = 5, pages = 3, table_positions = 50;
        Array<bf16> qkv(size_t(rows) * heads * head_dim);
        Array<float> bias(heads * head_dim), q_norm(head_dim), k_norm(head_dim), table(table_positions * head_dim);
        fill(qkv, 2), fill(bias, 1), fill(q_norm, 2), fill(k_norm, 2);
        for (uint32_t position = 0; position < table_positions; ++position) {
            for (int pair = 0; pair < half; ++pair) {
                const double angle = position * std::pow(10000.0, -double(pair) / half);
                table[position * head_dim + pair] = float(1.1 * std::cos(angle));
                table[position * head_dim + half + pair] = float(1.1 * std::sin(angle));
            }
        }
        Array<uint32_t> positions(rows);
        Array<int32_t> slots(rows);
        for (uint32_t row = 0; row < rows; ++row) positions[row] = below(table_positions);
        slots[0] = 0, slots[1] = 95, slots[2] = -1, slots[3] = 33, slots[4] = 64;
        const float epsilon = 0.5f;
        for (int variant = 0; variant < 4; ++variant) {
            const bool biased = variant & 1, normed = variant & 2;
            Array<bf16> queries(size_t(rows) * q_heads * padded_dim), keys(size_t(pages) * kv_heads * 32 * padded_dim),
                values(keys.size);
            emulation::launch({(rows * heads + 7) / 8, rotary::THREADS}, rotary_store, qkv.data, biased ? bias.data : nullptr,
                              normed ? q_norm.data : nullptr, normed ? k_norm.data : nullptr, table.data, positions.data,
                              slots.data, queries.data, keys.data, values.data, rows, q_heads, kv_heads, head_dim, padded_dim,
                              epsilon);
            size_t written = 0;
            for (uint32_t row = 0; row < rows; ++row) {
                for (int head = 0; head < heads; ++head) {
                    const bool is_query = head < q_heads, is_value = head >= q_heads + kv_heads;
                    if (!is_query && slots[row] < 0) continue;
                    std::vector<double> x(head_dim), turned(head_dim);
                    std::vector<float> plain(head_dim);
                    double squares = 0;
                    for (int at = 0; at < head_dim; ++at) {
                        plain[at] = __bfloat162float(qkv[(size_t(row) * heads + head) * head_dim + at]) +
                                    (biased ? bias[head * head_dim + at] : 0.0f);
                        x[at] = plain[at], squares += x[at] * x[at];
                    }
                    if (normed && !is_value) {
                        for (int at = 0; at < head_dim; ++at)
                            x[at] *= (is_query ? q_norm : k_norm)[at] / std::sqrt(squares / head_dim + epsilon);
                    }
                    for (int pair = 0; pair < half; ++pair) {
                        const double cosine = table[positions[row] * head_dim + pair],
                                     sine = table[positions[row] * head_dim + half + pair];
                        turned[pair] = x[pair] * cosine - x[half + pair] * sine;
                        turned[half + pair] = x[half + pair] * cosine + x[pair] * sine;
                    }
                    const int kv_head = (head - q_heads) % kv_heads;
                    const bf16 *const out =
                        is_query
                            ? &queries[(size_t(row) * q_heads + head) * padded_dim]
                            : &(is_value
                                    ? values
                                    : keys)[((size_t(slots[row] / 32) * kv_heads + kv_head) * 32 + slots[row] % 32) * padded_dim];
                    for (int at = 0; at < padded_dim; ++at) {
                        if (at >= head_dim) check(__bfloat16_as_ushort(out[at]) == 0, "padding is zero");
                        else if (is_value) check(is_rounded(out[at], plain[at]), "a value");
                        // A difference of two products may be far smaller than they are.
                        else
                            check(std::abs(__bfloat162float(out[at]) - turned[at]) <= std::abs(turned[at]) / 256 + 4e-6,
                                  "a query or key");
                    }
                    written += is_query ? 0 : size_t(padded_dim);
                }
            }
            size_t touched = 0;
            for (size_t at = 0; at < keys.size; ++at) touched += !is_untouched(keys[at]) + !is_untouched(values[at]);
            check(touched == written, "nothing else is written");
        }
    }
}

}  // namespace

int main() {
    try {
        for (auto schedule : {emulation::Schedule::Forward, emulation::Schedule::Backward, emulation::Schedule::Shuffled}) {
            emulation::options().schedule = schedule;
            norms();
            embeddings();
            gates();
            rotary_positions();
        }
        log_sum_exps();
    } catch (const emulation::Error &error) {
        check(false, error.what());
    }
    if (failures == 0) std::printf("rows: passed\n");
    return failures != 0;
}
