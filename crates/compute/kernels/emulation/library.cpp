// The kernels as a library that launches them by name, so that everything above a launch can be tested without a GPU: the same
// names, arguments and launch sizes that the driver gets.
//
// Place in the flow: built by tests of the Rust side, which load it as a device. Device memory is host memory there.
#include "../all.cu"

#include <cstring>
#include <string>

namespace {

using Call = void (*)(const emulation::Geometry &, void **);

// Takes the arguments out of the places that the driver would take them from.
template <auto kernel> struct Launcher;
template <class... Parameters, void (*kernel)(Parameters...)> struct Launcher<kernel> {
    template <std::size_t... at> static void call(const emulation::Geometry &geometry, void **arguments, std::index_sequence<at...>) {
        emulation::launch(geometry, kernel, *static_cast<std::remove_const_t<Parameters> *>(arguments[at])...);
    }
    static void launch(const emulation::Geometry &geometry, void **arguments) {
        call(geometry, arguments, std::index_sequence_for<Parameters...>{});
    }
    static constexpr std::uint32_t parameters = sizeof...(Parameters);
    static constexpr std::uint32_t bytes[] = {sizeof(Parameters)...};
};

struct Entry {
    const char *name;
    Call launch;
    std::uint32_t parameters;
    // Of each parameter.
    const std::uint32_t *bytes;
};

#define ENTRY(name) Entry{#name, &Launcher<&name>::launch, Launcher<&name>::parameters, Launcher<&name>::bytes}
#define POINTWISE(name) ENTRY(name##_16), ENTRY(name##_32), ENTRY(name##_64), ENTRY(name##_128)
#define POINTWISE_BY_KEY(name) \
    POINTWISE(name##_16), POINTWISE(name##_32), POINTWISE(name##_64), POINTWISE(name##_128), ENTRY(name##_256_256)
#define BY_WIDTH(name) ENTRY(name##_16), ENTRY(name##_32), ENTRY(name##_64), ENTRY(name##_128), ENTRY(name##_256)

using namespace expand;
using namespace log_sum_exp;

const Entry entries[] = {
    BY_WIDTH(prefill_attention), BY_WIDTH(prefill_attention_few), BY_WIDTH(branch_attention), BY_WIDTH(branch_attention_few), BY_WIDTH(branch_merge),
    POINTWISE_BY_KEY(pointwise_attention), POINTWISE_BY_KEY(pointwise_attention_few), ENTRY(pointwise_merge),
    ENTRY(hstu_embed), ENTRY(hstu_residual_norm), ENTRY(hstu_finish), ENTRY(hstu_split), ENTRY(hstu_gate), ENTRY(hstu_gate_group),
    ENTRY(branch_rows), ENTRY(embed_rms_norm), ENTRY(gather_rows), ENTRY(expand_begin), ENTRY(expand_normalize), ENTRY(expand_histogram),
    ENTRY(expand_refine), ENTRY(expand_collect), ENTRY(expand_finish), ENTRY(expand_small), ENTRY(fill_normal), ENTRY(silu_gate), ENTRY(log_sum_exp_f32),
    ENTRY(log_sum_exp_bf16), ENTRY(residual_rms_norm), ENTRY(rotary_store),
};

} // namespace

// The bytes of each parameter of a kernel, and how many there are; null if there is no such kernel.
extern "C" const std::uint32_t *emulated_parameters(const char *name, std::uint32_t *count) {
    for (const Entry &entry : entries) {
        if (std::strcmp(entry.name, name) != 0) continue;
        *count = entry.parameters;
        return entry.bytes;
    }
    return nullptr;
}

// Runs a kernel to its end. Returns 0, or 1 and a message of at most `message_size` bytes with the zero at its end.
extern "C" int emulated_launch(const char *name, const std::uint32_t *grid, std::uint32_t block, std::uint32_t shared, void **arguments,
                               std::uint32_t count, char *message, std::size_t message_size) {
    std::string said;
    try {
        for (const Entry &entry : entries) {
            if (std::strcmp(entry.name, name) != 0) continue;
            if (entry.parameters != count) {
                said = std::string(name) + " takes " + std::to_string(entry.parameters) + " arguments, not " + std::to_string(count);
                break;
            }
            entry.launch({dim3(grid[0], grid[1], grid[2]), dim3(block), shared}, arguments);
            return 0;
        }
        if (said.empty()) said = std::string("no kernel ") + name;
    } catch (const std::exception &error) {
        said = error.what();
    }
    std::strncpy(message, said.c_str(), message_size - 1);
    message[message_size - 1] = 0;
    return 1;
}
