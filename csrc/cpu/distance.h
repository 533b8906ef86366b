// What becomes of a layer's features, four rows of sixteen pixels at a time: t_l(q) is stored; d_l turns into
// distances, codes and the next layer's input. No include guard: see simd.h.

// Takes d_l of up to four rows: distance, codes, and b_l = relu(t(p)) - relu(t(q)) for the next layer.
template <bool LAST, bool POST, bool L1, bool SAVE>
struct DistanceEpilogue {
    static constexpr int PLANES = !L1 ? !LAST : LAST || POST ? 2 : 3;  // of codes, a feature
    Distance distance;
    std::ptrdiff_t pitch;
    const float* valid[BLOCK_ROWS];
    const float* tq[BLOCK_ROWS];
    const std::int16_t* only[BLOCK_ROWS];  // null: tq has every unit
    const float* table;
    float* b[BLOCK_ROWS];
    float* sum[BLOCK_ROWS];
    // Of the region's first owned unit; codes: plane 0 of the layer. Null: not this row.
    std::uint8_t* code[BLOCK_ROWS];
    float* saved[BLOCK_ROWS];
    std::ptrdiff_t plane_bytes;
    int channels, own_begin, own_end;
    float* nowhere;  // takes codes and differences that nobody wants

    // Sixteen pixels of the rows. A local object, which no store of a code can change, so it stays in
    // registers.
    struct Pixels {
        M16 mask[BLOCK_ROWS];
        F16 total[BLOCK_ROWS];
        const float* tq[BLOCK_ROWS];
        const float* alone[BLOCK_ROWS];  // t(q) of the unit, one value a channel; null: tq has it
        float* b[BLOCK_ROWS];
        float* sum[BLOCK_ROWS];
        std::uint8_t* code[BLOCK_ROWS];
        float* saved[BLOCK_ROWS];
        std::ptrdiff_t pitch, plane_bytes;
        bool l2;

        static void put_bits(std::uint8_t* to, unsigned word) {
            const std::uint16_t w = static_cast<std::uint16_t>(word);
            std::memcpy(to, &w, sizeof(w));
        }

        template <int ROWS>
        void put(int k, const F16* d) {
            const F16 zero = splat(0.0f);
            const std::ptrdiff_t at = k * pitch, plane = k * PLANES * plane_bytes;
            SEMEDA_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                F16 seen = d[r];
                unsigned on = 0;
                if (!LAST || POST) {
                    const F16 target = alone[r] ? splat(alone[r][k]) : load16(tq[r] + at);
                    const F16 prediction = target + d[r];
                    const F16 difference = relu(prediction) - relu(target);
                    if (!LAST) store16(b[r] + at, difference);
                    if (SAVE) on = bits(greater(prediction, zero));
                    if (POST) seen = difference;
                }
                seen = select(mask[r], seen, zero);
                if (L1) {
                    total[r] = total[r] + vabs(seen);
                } else if (l2) {
                    total[r] = fma(seen, seen, total[r]);
                } else {
                    const F16 size = vabs(seen), half = splat(0.5f);
                    total[r] = total[r] + select(greater(splat(1.0f), size), half * size * size, size - half);
                }
                if (!SAVE) continue;
                std::uint8_t* to = code[r] + plane;
                if (!L1) {
                    store16(saved[r] + k * UNIT, POST ? select(from_bits16(on), seen, zero) : seen);
                    if (!LAST) put_bits(to, on);
                    continue;
                }
                const unsigned above = bits(greater(seen, zero)), below = bits(greater(zero, seen));
                if (LAST) {
                    const unsigned kept = POST ? on : 0xffffu;
                    put_bits(to, above & kept);
                    put_bits(to + plane_bytes, below & kept);
                } else if (POST) {
                    put_bits(to, on & ~below);
                    put_bits(to + plane_bytes, on & ~above);
                } else {
                    put_bits(to, above);
                    put_bits(to + plane_bytes, below);
                    put_bits(to + 2 * plane_bytes, on);
                }
            }
        }

        void done() {
            for (int r = 0; r < BLOCK_ROWS; ++r) store16(sum[r], total[r]);
        }
    };

    Pixels unit(int number, bool first) const {
        Pixels at;
        const int x = number * UNIT;
        const bool own = number >= own_begin && number < own_end;
        at.pitch = pitch;
        at.plane_bytes = plane_bytes;
        at.l2 = distance == Distance::l2;
        SEMEDA_UNROLL
        for (int r = 0; r < BLOCK_ROWS; ++r) {
            at.mask[r] = greater(load16(valid[r] + x), splat(0.0f));
            at.total[r] = first ? splat(0.0f) : load16(sum[r] + x);
            at.sum[r] = sum[r] + x;
            const int label = only[r] ? only[r][number] : -1;
            at.alone[r] = label < 0 ? nullptr : table + static_cast<std::ptrdiff_t>(label) * channels;
            at.tq[r] = !LAST || POST ? tq[r] + x : nullptr;
            at.b[r] = LAST ? nullptr : b[r] + x;
            const bool here = own && code[r];
            at.code[r] = here ? code[r] + (number - own_begin) * 2 : reinterpret_cast<std::uint8_t*>(nowhere);
            at.saved[r] = here && saved[r] ? saved[r] + (number - own_begin) * channels * UNIT : nowhere;
        }
        return at;
    }
};

// Takes conv_l(a_{l-1}(q)) and stores t_l(q).
struct TargetEpilogue {
    const float* bias;
    std::ptrdiff_t pitch;
    float* to[BLOCK_ROWS];

    struct Pixels {
        const TargetEpilogue& all;
        int x;
        template <int ROWS>
        void put(int k, const F16* t) {
            for (int r = 0; r < ROWS; ++r) {
                store16(all.to[r] + k * all.pitch + x, t[r] + splat(all.bias[k]));
            }
        }
        void done() {}
    };

    Pixels unit(int number, bool) const { return {*this, number * UNIT}; }
};
