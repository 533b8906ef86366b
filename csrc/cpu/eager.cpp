#include "eager.h"

#include <cmath>
#include <cstring>
#include <string>

#include "../check.h"

namespace semeda_fast {

namespace {

std::int64_t to_line(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Floats of the proxy's tensor of that number: weights first.
std::int64_t parameters_of(const LossParams& p, int number) {
    return number < p.layers ? weights_of(p.layer[number]) : p.layer[number - p.layers].out;
}

void place(TensorView& view, const Memory& memory) {
    view.data = memory.data;
    view.before = memory.before;
    view.after = memory.after;
}

float divisor(const Reduction& reduction, float count) {
    return count > 0 || reduction.nan_if_empty ? count : 1.0f;
}

}  // namespace

EagerLoss::EagerLoss(const LossParams& params, const std::vector<Buffer<const float>>& proxy,
                     const Reduction& reduction)
    : params_(params), proxy_(proxy), reduction_(reduction) {
    check_sizes(params, MAX_CLASSES);
    const std::int64_t rows = params.n * params.h;
    saved_d_at_ = to_line(rows * code_bytes_per_row(params));
    parameters_at_ = to_line(saved_d_at_ + rows * saved_floats_per_row(params) * 4);
    if (proxy.size() != 2 * static_cast<std::size_t>(params.layers)) {
        refuse(std::to_string(proxy.size()) + " tensors for the weights and biases of " +
               std::to_string(params.layers) + " layers");
    }
    for (int i = 0; i < 2 * params.layers; ++i) {
        const std::int64_t bytes = 4 * parameters_of(params, i);
        need("a tensor of the proxy", proxy[static_cast<std::size_t>(i)], bytes);
        parameter_bytes_ += bytes;
    }
}

LossParams EagerLoss::with(const EagerTensors& tensors, const float* parameters) const {
    LossParams p = params_;
    place(p.logits, tensors.logits);
    place(p.target, tensors.target);
    place(p.valid, tensors.valid);
    p.class_weight = {};
    if (tensors.class_weight.is_given()) {
        p.class_weight = {static_cast<const float*>(tensors.class_weight.data), tensors.class_weight.after};
    }
    p.threads = tensors.threads;
    p.ce_map = p.semeda_map = {};
    p.codes = {};
    p.saved_d = {};
    if (tensors.kept.is_given()) {
        auto* kept = static_cast<std::uint8_t*>(tensors.kept.data);
        p.codes = {kept, saved_d_at_};
        const std::int64_t bytes = parameters_at_ - saved_d_at_;
        if (bytes > 0) p.saved_d = {reinterpret_cast<float*>(kept + saved_d_at_), bytes};
    }
    set_proxy(p, {parameters, parameter_bytes_});
    return p;
}

float* EagerLoss::parameters_in(const Memory& kept) const {
    need("what forward keeps for backward", Buffer<float>{static_cast<float*>(kept.data), kept.after},
         kept_bytes());
    return reinterpret_cast<float*>(static_cast<char*>(kept.data) + parameters_at_);
}

EagerResult EagerLoss::forward(const EagerTensors& tensors, float lambda_ce, float lambda_semeda) const {
    // A copy, so that a change of the proxy between the directions reaches none of them.
    thread_local std::vector<float> own;
    float* parameters;
    if (tensors.kept.is_given()) {
        parameters = parameters_in(tensors.kept);
    } else {
        own.resize(static_cast<std::size_t>(parameter_bytes_ / 4));
        parameters = own.data();
    }
    float* next = parameters;
    for (std::size_t i = 0; i < proxy_.size(); ++i) {
        const std::int64_t count = parameters_of(params_, static_cast<int>(i));
        std::memcpy(next, proxy_[i].data, static_cast<std::size_t>(count) * sizeof(float));
        next += count;
    }
    LossParams p = with(tensors, parameters);
    float terms[3 + MAX_LAYERS] = {};
    std::int64_t counts[2] = {};
    p.terms = {terms, sizeof terms};
    p.counts = {counts, sizeof counts};
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

std::int64_t EagerLoss::backward(const EagerTensors& tensors, const EagerResult& result, float d_loss,
                                 const TensorView& d_logits) const {
    LossParams p = with(tensors, parameters_in(tensors.kept));
    float d_ce, d_semeda;
    seeds(result, d_loss, d_ce, d_semeda);
    p.d_ce = p.d_semeda = TensorView{};
    place(p.d_ce, {&d_ce, 0, sizeof d_ce});
    place(p.d_semeda, {&d_semeda, 0, sizeof d_semeda});
    p.d_semeda_is_map = false;
    p.d_logits = d_logits;
    return semeda_fast::backward(p);
}

}  // namespace semeda_fast
