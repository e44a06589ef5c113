// Rows that are picked out of tables: embeddings of tokens, and any rows by number.
//
// Place in the flow: `embed_rms_norm` begins a forward pass and does the first norm on the way; `gather_rows` serves wherever
// rows of a step are put together from others (queries of the wanted rows in the last layer, for one).
#include "rms_norm.cuh"

// residual[row] = table[token of row] in single precision, out[row] = rms_norm(residual[row]) * weight. A token beyond the
// vocabulary has an embedding of zeros; the host lets none pass.
//
//   table [vocabulary][width] bf16, residual [rows][width] f32, weight [width] f32, out [rows][width] bf16
//
// Grid: one block per row, `rms_norm.cuh` says of how many threads. Width at most 16384. Arrays begin at multiples of 16 bytes.
extern "C" __global__ void __launch_bounds__(rms_norm::MOST_THREADS)
    embed_rms_norm(const uint32_t *tokens, const bf16 *table, const float *weight, float *residual, bf16 *out,
                   uint32_t vocabulary, int width, float epsilon) {
    const size_t row = blockIdx.x;
    const uint32_t token = tokens[row];
    rms_norm::Row values = {};
    if (token < vocabulary) rms_norm::load_row(table + static_cast<size_t>(token) * width, width, values);
    rms_norm::store_row(residual + row * width, width, values);
    rms_norm::normalize(values, weight, width, epsilon);
    rms_norm::store_row(out + row * width, width, values);
}

namespace gather {

constexpr int THREADS = 256;

// Word number `at` of all words of the rows.
template <class Word>
__device__ __forceinline__ void copy_word(const void *from, const uint32_t *row_index, void *to, size_t row_words, size_t at) {
    const size_t row = at / row_words, word = at % row_words;
    static_cast<Word *>(to)[at] = static_cast<const Word *>(from)[row_index[row] * row_words + word];
}

}  // namespace gather

// to[row] = from[row_index[row]], rows of `row_bytes` bytes, an even number. Arrays begin at multiples of 16 bytes.
// Grid: ceil(rows * words / 256) blocks of 256 threads, where a row has row_bytes / 16 words if that is a whole number, else
// row_bytes / 2.
extern "C" __global__ void __launch_bounds__(gather::THREADS)
    gather_rows(const void *from, const uint32_t *row_index, void *to, uint32_t rows, uint32_t row_bytes) {
    const size_t at = static_cast<size_t>(blockIdx.x) * gather::THREADS + threadIdx.x;
    if (row_bytes % 16 == 0) {
        if (at < static_cast<size_t>(rows) * (row_bytes / 16)) gather::copy_word<uint4>(from, row_index, to, row_bytes / 16, at);
    } else {
        if (at < static_cast<size_t>(rows) * (row_bytes / 2)) gather::copy_word<uint16_t>(from, row_index, to, row_bytes / 2, at);
    }
}
