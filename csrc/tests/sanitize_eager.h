// The loss with its reduction as one call (cpu/eager.h) against the two directions that it is made of, with
// all that is kept for backward in a block of its exact size. Included by sanitize.cpp, whose Problem and
// Judge it uses.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "../cpu/eager.h"

namespace {

// Writes the gradient of the logits for these scalars.
template <class Backward>
Tensor gradient_of(const Problem& problem, int poison, const Backward& run) {
    const Case& c = problem.c;
    const bool dense = c.layout != Layout::expanded && c.layout != Layout::spaced;
    Tensor d_logits(c.shape.n, c.binary ? 1 : c.shape.classes, c.rows(), c.columns(), c.dtype,
                    dense ? c.layout : Layout::nchw, poison);
    run(d_logits.view);
    return d_logits;
}

void run_eager(const Problem& problem, const Forward& saved, const Judge& judge) {
    if (problem.c.maps) return;
    const LossParams& p = problem.p;
    std::vector<Buffer<const float>> proxy;
    for (int l = 0; l < p.layers; ++l) proxy.push_back(p.layer[l].weight);
    for (int l = 0; l < p.layers; ++l) proxy.push_back(p.layer[l].bias);
    const EagerLoss loss(p, proxy, Reduction{false, false, false});
    const auto memory = [](const TensorView& view) { return Memory{view.data, view.before, view.after}; };
    const Block& weights = problem.class_weight;
    EagerTensors tensors{memory(p.logits), memory(p.target), memory(p.valid), {}, {}, 3};
    if (weights.bytes())
        tensors.class_weight = {weights.as<void>(), 0, static_cast<std::int64_t>(weights.bytes())};
    const EagerResult alone = loss.forward(tensors, 2.0f, 0.5f);
    const Block kept(static_cast<std::size_t>(loss.kept_bytes()));
    tensors.kept = {kept.as<void>(), 0, loss.kept_bytes()};
    const EagerResult result = loss.forward(tensors, 2.0f, 0.5f);

    const float* terms = saved.terms.as<float>();
    const float expected = std::fma(terms[1], 0.5f, 2.0f * terms[0]);
    judge.expect(!std::memcmp(&result.loss, &alone.loss, sizeof(float)), "the loss depends on what is kept");
    judge.expect(problem.c.bad_labels || result.loss == expected, "the loss of an eager call", result.loss);
    judge.expect(result.valid_count == saved.counts.as<std::int64_t>()[0], "the count of an eager call");
    const char* at = kept.as<char>();
    judge.expect(!saved.codes.bytes() || !std::memcmp(at, saved.codes.as<char>(), saved.codes.bytes()),
                 "the codes of an eager call");
    judge.expect(!saved.saved_d.bytes() ||
                     !std::memcmp(at + loss.saved_d_at(), saved.saved_d.as<char>(), saved.saved_d.bytes()),
                 "the differences of an eager call");

    const Tensor found = gradient_of(
        problem, 0xFF, [&](const TensorView& d_logits) { loss.backward(tensors, result, 0.75f, d_logits); });
    float d_ce = 0, d_semeda = 0;
    loss.seeds(result, 0.75f, d_ce, d_semeda);
    const Tensor wanted = gradient_of(problem, 0x00, [&](const TensorView& d_logits) {
        LossParams q = p;
        q.codes = saved.codes.buffer<std::uint8_t>();
        q.saved_d = saved.saved_d.buffer<float>();
        for (const auto& [view, value] : {std::pair(&q.d_ce, &d_ce), std::pair(&q.d_semeda, &d_semeda)}) {
            view->data = value;
            view->before = 0;
            view->after = sizeof(float);
        }
        q.d_logits = d_logits;
        backward(q);
    });
    judge.expect(found.block.same(wanted.block), "the gradient of an eager call");
}

}  // namespace
