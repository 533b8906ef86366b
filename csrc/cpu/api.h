// What the CPU kernels offer: both directions of the loss, and facts about this processor.
#pragma once

#include <cstdint>
#include <string>

#include "../params.h"

namespace semeda_fast {

constexpr int MAX_CLASSES = 1024;  // labels are kept as int16, and scratch grows with the classes

// Bytes of codes, and floats of saved differences, of one image row; of sizes that check.h has seen.
std::int64_t code_bytes_per_row(const LossParams& params);
std::int64_t saved_floats_per_row(const LossParams& params);

// The three that read memory check all of it first (../check.h), and throw std::invalid_argument. Backward
// returns how many valid pixels hold a label that is no class: then the gradient there is NaN.
void forward(const LossParams& params);
std::int64_t backward(const LossParams& params);

// Whether a label is neither a class nor ignored where valid is true; one pass, no allocation.
bool has_bad_label(const LossParams& params);

// The instruction set in use; setting an unknown or unavailable name returns false and changes nothing.
const char* instruction_set();
bool use_instruction_set(const std::string& name);

// Names of those compiled in, best first, ended by null; and whether this processor has the named one.
const char* const* built_instruction_sets();

double fma_peak(int threads);  // FLOP/s in fp32, a fused multiply-add counts as 2
double copy_bandwidth(int threads, std::int64_t num_bytes);  // bytes/s, read and written bytes both counted

}  // namespace semeda_fast
