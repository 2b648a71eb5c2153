// Hadamard transform and 2-bit codes of one vector (arXiv 2510.18413, section 3.1). Per-ISA include.

// Orthonormal and in place, from D dimensions to the S of a signature; block-diagonal, with blocks of the largest
// power of two that divides S.
template <int D>
static inline void hadamard(float* x) {
  constexpr int S = coded_size(D), block = S & -S;
  for (int i = D; i < S; ++i) x[i] = 0;
  int step = 1;
#ifndef __clang__  // clang has no variable shuffle; there the loop below does every step
  for (; step < kLanes && step < block; step *= 2) {
    vi partner;
    vf sign;
    for (int lane = 0; lane < kLanes; ++lane) {
      partner[lane] = lane ^ step;
      sign[lane] = lane & step ? -1.0f : 1.0f;
    }
    for (int i = 0; i < S; i += kLanes) {
      const vf v = load<vf>(x + i);
      store(x + i, __builtin_shuffle(v, partner) + v * sign);
    }
  }
#endif
  for (; step < block; step *= 2)
    for (int i = 0; i < S; i += 2 * step)
      for (int j = i; j < i + step; ++j) {
        const float a = x[j], b = x[j + step];
        x[j] = a + b;
        x[j + step] = a - b;
      }
  const float norm = 1.0f / __builtin_sqrtf(float(block));
  for (int i = 0; i < S; i += kLanes) store(x + i, load<vf>(x + i) * norm);
}

template <int S>
static inline void subtract(float* x, const float* mean) {
  for (int i = 0; i < S; i += kLanes) store(x + i, load<vf>(x + i) - load<vf>(mean + i));
}

template <int S>
static inline float outer_threshold(const float* x, Coding coding) {
  if (!coding.relative) return coding.threshold;
  vf squares = {};
  for (int i = 0; i < S; i += kLanes) squares += load<vf>(x + i) * load<vf>(x + i);
  return coding.threshold * __builtin_sqrtf(hsum(squares) / S);
}

// A code 2 * hi + lo is the number of thresholds -t, 0, t at or below x. NaN compares false: code 0.
template <int S>
static inline void encode(const float* x, float t, int32_t* codes) {
  for (int i = 0; i < S; i += kLanes) {
    const vf v = load<vf>(x + i);
    store(codes + i, -((v >= -t) + (v >= 0.0f) + (v >= t)));  // a true lane is -1
  }
}

template <int S>
static inline void pack_planes(const int32_t* codes, uint32_t* hi, uint32_t* lo) {
  for (int w = 0; w < S / kWord; ++w) {
    hi[w] = pack_bits(codes + w * kWord, 2);
    lo[w] = pack_bits(codes + w * kWord, 1);
  }
}

// Least-squares factor from the levels {-3,-1,1,3} to x, clamped to finite fp16 values.
template <int S>
static inline float level_scale(const float* x, const int32_t* codes) {
  vf product = {}, squares = {};
  for (int i = 0; i < S; i += kLanes) {
    const vf level = __builtin_convertvector(2 * load<vi>(codes + i) - 3, vf);
    product += load<vf>(x + i) * level;
    squares += level * level;
  }
  const float scale = hsum(product) / hsum(squares);
  if (!(scale == scale)) return 0.0f;
  return scale > 65504.0f ? 65504.0f : scale < -65504.0f ? -65504.0f : scale;
}

template <int D>
static inline void load_vector(const Rows& rows, int64_t token, int head, float* x) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride;
  if (rows.element == Element::bf16) {  // the usual case, vectorised
    const uint16_t* p = (const uint16_t*)rows.data + at;
    for (int i = 0; i < D; i += kLanes)
      store(x + i, (vf)(__builtin_convertvector(load<vh>(p + i), vu) << 16));
  } else {
    for (int i = 0; i < D; ++i) x[i] = load_scalar(rows.data, at + i, rows.element);
  }
}
