// The loss with its reduction as one call in each direction, for eager code: what torch would do around the
// kernels in a dozen steps, each of which costs more than the arithmetic in it.
#pragma once

#include <cstdint>
#include <vector>

#include "api.h"

namespace semeda_fast {

// How terms become a loss (semeda_fast/functional.py):
//     mean, not weighted: (lambda_ce * ce + lambda_semeda * semeda) / V
//     mean, weighted:     lambda_ce * ce / ce_weight + lambda_semeda * semeda / V
//     sum:                lambda_ce * ce + lambda_semeda * semeda
struct Reduction {
    bool mean = true, weighted = false;
    bool nan_if_empty = false;  // else a divisor of 0 counts as 1
};

// What a call has of its own beside sizes, dtypes and strides: where its tensors lie, and in how much memory.
struct Memory {
    void* data = nullptr;
    std::int64_t before = -1, after = 0;  // as in TensorView
    bool is_given() const { return before >= 0; }
};
struct EagerTensors {
    Memory logits, target, valid, class_weight;
    Memory kept;  // kept_bytes(), for backward; not given: no backward will come
    int threads = 1;
};

// What forward found, and what backward needs to know of it.
struct EagerResult : Zeroed {
    float lambda_ce = 1, lambda_semeda = 0;
    float loss = 0, ce_weight = 0;
    std::int64_t valid_count = 0, bad_labels = 0;
};

class EagerLoss : public Zeroed {
  public:
    // params: all but addresses. proxy: each layer's weights, then each layer's biases, contiguous fp32,
    // which outlive the loss.
    EagerLoss(const LossParams& params, const std::vector<Buffer<const float>>& proxy,
              const Reduction& reduction);

    const LossParams& params() const { return params_; }
    // kept: codes, then saved_d, then the proxy's parameters as they were in forward.
    std::int64_t kept_bytes() const { return parameters_at_ + parameter_bytes_; }
    std::int64_t saved_d_at() const { return saved_d_at_; }
    std::int64_t parameters_at() const { return parameters_at_; }

    EagerResult forward(const EagerTensors& tensors, float lambda_ce, float lambda_semeda) const;
    // d_loss: what comes down to the loss; result: that of forward. Returns what backward of api.h does.
    std::int64_t backward(const EagerTensors& tensors, const EagerResult& result, float d_loss,
                          const TensorView& d_logits) const;
    // What comes down to ce and semeda.
    void seeds(const EagerResult& result, float d_loss, float& d_ce, float& d_semeda) const;

  private:
    LossParams with(const EagerTensors& tensors, const float* parameters) const;
    float* parameters_in(const Memory& kept) const;  // of kept_bytes(), or it throws

    const LossParams params_;
    const std::vector<Buffer<const float>> proxy_;
    const Reduction reduction_;
    std::int64_t saved_d_at_ = 0, parameters_at_ = 0, parameter_bytes_ = 0;
};

}  // namespace semeda_fast
