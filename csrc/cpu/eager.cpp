#include "eager.h"

#include <cmath>
#include <cstring>

namespace semeda_fast {

namespace {

std::int64_t to_line(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

float divisor(const Reduction& reduction, float count) {
    return count > 0 || reduction.nan_if_empty ? count : 1.0f;
}

}  // namespace

EagerLoss::EagerLoss(const LossParams& params, const std::vector<const float*>& proxy,
                     const Reduction& reduction)
    : params_(params), proxy_(proxy), reduction_(reduction) {
    const std::int64_t rows = params.n * params.h;
    saved_d_at_ = to_line(rows * code_bytes_per_row(params));
    parameters_at_ = to_line(saved_d_at_ + rows * saved_floats_per_row(params) * 4);
    for (int l = 0; l < params.layers; ++l) {
        parameter_bytes_ += 4 * (weights_of(params.layer[l]) + params.layer[l].out);
    }
}

LossParams EagerLoss::with(const EagerTensors& tensors, const float* parameters) const {
    LossParams p = params_;
    p.logits.data = tensors.logits;
    p.target.data = tensors.target;
    p.valid.data = tensors.valid;
    p.class_weight = tensors.class_weight;
    p.threads = tensors.threads;
    if (tensors.kept) {
        p.codes = static_cast<std::uint8_t*>(tensors.kept);
        if (parameters_at_ > saved_d_at_) p.saved_d = reinterpret_cast<float*>(p.codes + saved_d_at_);
    }
    set_proxy(p, parameters);
    return p;
}

EagerResult EagerLoss::forward(const EagerTensors& tensors, float lambda_ce, float lambda_semeda) const {
    // A copy, so that a change of the proxy between the directions reaches none of them.
    thread_local std::vector<float> own;
    float* parameters;
    if (tensors.kept) {
        parameters = reinterpret_cast<float*>(static_cast<char*>(tensors.kept) + parameters_at_);
    } else {
        own.resize(static_cast<std::size_t>(parameter_bytes_ / 4));
        parameters = own.data();
    }
    float* next = parameters;
    for (int i = 0; i < 2 * params_.layers; ++i) {
        const Layer& layer = params_.layer[i % params_.layers];
        const std::int64_t count = i < params_.layers ? weights_of(layer) : layer.out;
        std::memcpy(next, proxy_[static_cast<std::size_t>(i)],
                    static_cast<std::size_t>(count) * sizeof(float));
        next += count;
    }
    LossParams p = with(tensors, parameters);
    float terms[3 + MAX_LAYERS] = {};
    std::int64_t counts[2] = {};
    p.terms = terms;
    p.counts = counts;
    semeda_fast::forward(p);

    EagerResult result;
    result.lambda_ce = lambda_ce;
    result.lambda_semeda = lambda_semeda;
    result.ce_weight = terms[2];
    result.valid_count = counts[0];
    result.bad_labels = counts[1];
    float ce = terms[0], semeda = terms[1];
    const float count = divisor(reduction_, static_cast<float>(counts[0]));
    if (reduction_.mean && reduction_.weighted) {
        ce /= divisor(reduction_, terms[2]);
        semeda /= count;
    }
    result.loss = std::fma(semeda, lambda_semeda, lambda_ce * ce);
    if (reduction_.mean && !reduction_.weighted) result.loss /= count;
    return result;
}

void EagerLoss::seeds(const EagerResult& result, float d_loss, float& d_ce, float& d_semeda) const {
    const float count = divisor(reduction_, static_cast<float>(result.valid_count));
    if (reduction_.mean && !reduction_.weighted) d_loss /= count;
    d_ce = result.lambda_ce * d_loss;
    d_semeda = result.lambda_semeda * d_loss;
    if (reduction_.mean && reduction_.weighted) {
        d_ce /= divisor(reduction_, result.ce_weight);
        d_semeda /= count;
    }
}

void EagerLoss::backward(const EagerTensors& tensors, const EagerResult& result, float d_loss,
                         const View& d_logits) const {
    LossParams p = with(
        tensors, reinterpret_cast<const float*>(static_cast<const char*>(tensors.kept) + parameters_at_));
    float d_ce, d_semeda;
    seeds(result, d_loss, d_ce, d_semeda);
    p.d_ce.data = &d_ce;
    p.d_semeda.data = &d_semeda;
    p.d_logits = d_logits;
    semeda_fast::backward(p);
}

}  // namespace semeda_fast
