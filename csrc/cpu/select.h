// select: exact top-k of one score row, ties to the most recent token. Per-ISA include.
//
// A pivot taken from a sample leaves a few times k candidates after one pass. The k-th best value is then found bit
// by bit among their order-preserving integers. Where many scores are equal, the pivot itself often is the k-th best,
// and no candidates are needed. The result is exact: the sample only affects the number of candidates, and if the
// pivot is too high, all tokens become candidates.

// The lanes whose value is above the bound or, with kEqual, at it.
#ifdef __AVX512F__
template <bool kEqual>
static inline __mmask16 reaching(vf x, vf bound) {
  return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, kEqual ? _CMP_GE_OQ : _CMP_GT_OQ);
}
template <bool kEqual>
static inline __mmask16 reaching(vi x, vi bound) {
  return _mm512_cmp_epi32_mask((__m512i)x, (__m512i)bound, kEqual ? _MM_CMPINT_NLT : _MM_CMPINT_NLE);
}
#else
template <bool kEqual, class V>
static inline vi reaching(V x, V bound) {
  return kEqual ? x >= bound : x > bound;  // a true lane is -1
}
#endif

template <bool kEqual, class T>
static inline bool reaches(T x, T bound) {
  return kEqual ? x >= bound : x > bound;
}

template <bool kEqual, class T>
static inline int count_reaching(const T* values, int n, T bound) {
  typedef T V __attribute__((vector_size(4 * kLanes)));
  const V limit = bound - V{};
  int i = 0;
#ifdef __AVX512F__
  int count = 0;
  for (; i + kLanes <= n; i += kLanes) count += __builtin_popcount(reaching<kEqual>(load<V>(values + i), limit));
#else
  vi counts = {};
  for (; i + kLanes <= n; i += kLanes) counts -= reaching<kEqual>(load<V>(values + i), limit);
  int count = hsum(counts);
#endif
  for (; i < n; ++i) count += reaches<kEqual>(values[i], bound);
  return count;
}

// Writes base + i for every value i that reaches the bound, in order, and returns their number. `out` has room for
// kTile more, and may be `values`: writes never overtake reads.
template <bool kEqual, class T>
static inline int filter(const T* values, int n, T bound, int base, int32_t* out) {
  typedef T V __attribute__((vector_size(4 * kLanes)));
  const V limit = bound - V{};
  int count = 0, i = 0;
#ifdef __AVX512F__
  __m512i index = _mm512_add_epi32(_mm512_set1_epi32(base),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (; i + kLanes <= n; i += kLanes) {
    const __mmask16 kept = reaching<kEqual>(load<V>(values + i), limit);
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(kept, index));
    count += __builtin_popcount(kept);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(kLanes));
  }
#else
  for (; i + kLanes <= n; i += kLanes) {
    const vi kept = reaching<kEqual>(load<V>(values + i), limit);
    for (int lane = 0; lane < kLanes; ++lane) {
      out[count] = base + i + lane;
      count -= kept[lane];
    }
  }
#endif
  for (; i < n; ++i) {
    const bool kept = reaches<kEqual>(values[i], bound);
    out[count] = base + i;
    count += kept;
  }
  return count;
}

// Writes base + i for the k best values i, in order; `bound` is the k-th best, or a bound that k values reach.
template <class T>
static inline void filter_best(const T* values, int n, int k, T bound, int base, int32_t* out) {
  int ties = count_reaching<true>(values, n, bound) - k;  // values at the bound to skip, the first ones
  int split = 0;
  constexpr int kRun = 256;
  while (ties > 0) {
    const int run = n - split < kRun ? n - split : kRun;
    const int equal = count_reaching<true>(values + split, run, bound) - count_reaching<false>(values + split, run, bound);
    if (equal > ties) break;
    ties -= equal;
    split += run;
  }
  for (; ties > 0; ++split) ties -= values[split] == bound;
  const int above = filter<false>(values, split, bound, base, out);
  filter<true>(values + split, n - split, bound, base + split, out + above);
}

// An integer in the order of the floats; -0 is 0, which is equal.
static inline int32_t order_key(float x) {
  const int32_t bits = int32_t(float_to_bits(x + 0.0f));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The k-th best key, or the first bound tried that exactly k keys reach.
static inline int32_t kth_bound(const int32_t* keys, int n, int k) {
  uint32_t bound = 0;
  int reached = n;
  for (int bit = 31; bit >= 0 && reached != k; --bit) {
    const uint32_t trial = bound | (1u << bit);
    const int count = count_reaching<true>(keys, n, int32_t(trial ^ 0x80000000u));
    if (count >= k) {
      bound = trial;
      reached = count;
    }
  }
  return int32_t(bound ^ 0x80000000u);
}

// A score that probably at least k of the scores reach, and not many more, unless they are equal.
static inline float estimate_pivot(const float* scores, int n, int k) {
  constexpr int kSample = 256;
  const int step = n / kSample;
  // Expected rank of the k-th best score in the sample, plus three standard deviations.
  const float rank = float(k) * kSample / n;
  const int spare = int(rank + 3.0f * __builtin_sqrtf(rank) + 2.0f);
  if (step < 4 || spare >= kSample) return -__builtin_inff();
  int32_t sample[kSample];
  for (int i = 0; i < kSample; ++i) {
    const uint32_t random = uint32_t(i) * 2654435769u >> 16;  // scores may repeat at a distance of `step`
    sample[i] = order_key(scores[i * step + int(uint64_t(random) * step >> 16)]);
  }
  const int32_t key = kth_bound(sample, kSample, spare);
  return bits_to_float(uint32_t(key ^ ((key >> 31) & 0x7fffffff)));
}

static void select_tokens(const float* scores, int n, int k, int base, int32_t* out, int32_t* scratch) {
  if (k >= n) {
    for (int i = 0; i < n; ++i) out[i] = base + i;
    return;
  }
  if (k <= 0) return;
  int32_t* keys = scratch;
  int32_t* tokens = scratch + n + kTile;
  const float pivot = estimate_pivot(scores, n, k);
  int count = filter<false>(scores, n, pivot, 0, tokens);
  if (count < k) {
    if (count_reaching<true>(scores, n, pivot) >= k) return filter_best(scores, n, k, pivot, base, out);
    for (count = 0; count < n; ++count) tokens[count] = count;
  }
  for (int i = 0; i < count; ++i) keys[i] = order_key(scores[tokens[i]]);
  filter_best(keys, count, k, kth_bound(keys, count, k), 0, keys);
  for (int i = 0; i < k; ++i) out[i] = base + tokens[keys[i]];
}
