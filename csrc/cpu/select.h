// select: exact top-k of one score row, ties to the most recent token. Per-ISA include.
//
// A pivot taken from a sample leaves a few times k candidates after one pass. The k-th best value is then
// found bit by bit among their order-preserving integers. The result is exact: the sample only affects
// the number of candidates, and if there are fewer than k, all tokens become candidates.

static inline vi order_keys(vf x) {  // signed integers in the order of the floats
  vi bits = (vi)(x + 0.0f);          // -0 becomes 0, which is equal
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline int count_at_least(const int32_t* keys, int n, int32_t bound) {
  const vi limit = splat_int(bound);
  int i = 0;
#ifdef __AVX512F__
  int count = 0;
  for (; i + kLanes <= n; i += kLanes)
    count += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + i), (__m512i)limit));
#else
  vi counts = {};
  for (; i + kLanes <= n; i += kLanes) counts -= load<vi>(keys + i) >= limit;
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += counts[lane];
#endif
  for (; i < n; ++i) count += keys[i] >= bound;
  return count;
}

// The largest bound that at least k keys reach, or the first bound tried that exactly k keys reach.
static inline int32_t kth_bound(const int32_t* keys, int n, int k, int* reached) {
  uint32_t bound = 0;
  *reached = n;
  for (int bit = 31; bit >= 0 && *reached != k; --bit) {
    const uint32_t trial = bound | (1u << bit);
    const int count = count_at_least(keys, n, int32_t(trial ^ 0x80000000u));
    if (count >= k) {
      bound = trial;
      *reached = count;
    }
  }
  return int32_t(bound ^ 0x80000000u);
}

static inline int32_t order_key(float x) {
  const int32_t bits = int32_t(float_to_bits(x + 0.0f));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Writes base + i for every key i that reaches the bound, in order, and returns their number. `out` has
// room for kTile more. With kRaw the values are scores, otherwise their keys.
template <bool kRaw>
static inline int filter(const void* values, int n, int32_t bound, int base, int32_t* out) {
  int count = 0, i = 0;
  const vi limit = splat_int(bound);
#ifdef __AVX512F__
  __m512i index = _mm512_add_epi32(_mm512_set1_epi32(base),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (; i + kLanes <= n; i += kLanes) {
    vi key = load<vi>((const int32_t*)values + i);
    if (kRaw) key = order_keys((vf)key);
    const __mmask16 mask = _mm512_cmpge_epi32_mask((__m512i)key, (__m512i)limit);
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(mask, index));
    count += __builtin_popcount(mask);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(kLanes));
  }
#else
  for (; i + kLanes <= n; i += kLanes) {
    vi key = load<vi>((const int32_t*)values + i);
    if (kRaw) key = order_keys((vf)key);
    const vi reached = key >= limit;
    for (int lane = 0; lane < kLanes; ++lane) {
      out[count] = base + i + lane;
      count -= reached[lane];
    }
  }
#endif
  for (; i < n; ++i) {
    const int32_t key = kRaw ? order_key(((const float*)values)[i]) : ((const int32_t*)values)[i];
    out[count] = base + i;
    count += key >= bound;
  }
  return count;
}

static void select_tokens(const float* scores, int n, int k, int base, int32_t* out, int32_t* scratch) {
  if (k >= n) {
    for (int i = 0; i < n; ++i) out[i] = base + i;
    return;
  }
  if (k <= 0) return;
  int32_t* keys = scratch;
  int32_t* tokens = scratch + n + kTile;
  constexpr int kSample = 256;
  const int32_t lowest = int32_t(0x80000000u);
  int32_t pivot = lowest;
  int reached;
  if (n >= 4 * kSample) {
    int32_t sample[kSample];
    for (int i = 0; i < kSample; ++i) sample[i] = order_key(scores[int64_t(i) * n / kSample]);
    // Expected rank of the k-th best score in the sample, plus three standard deviations.
    const float rank = float(k) * kSample / n;
    const int spare = int(rank + 3.0f * __builtin_sqrtf(rank) + 2.0f);
    if (spare < kSample) pivot = kth_bound(sample, kSample, spare, &reached);
  }
  int count = filter<true>(scores, n, pivot, 0, tokens);
  if (count < k) count = filter<true>(scores, n, lowest, 0, tokens);
  for (int i = 0; i < count; ++i) keys[i] = order_key(scores[tokens[i]]);

  const int32_t bound = kth_bound(keys, count, k, &reached);
  if (reached == k) {
    filter<false>(keys, count, bound, 0, keys);  // positions, in place: writes never overtake reads
    for (int i = 0; i < k; ++i) out[i] = base + tokens[keys[i]];
    return;
  }
  // More keys equal the bound than fit: skip the first `ties` of them and keep the last ones.
  int ties = reached - k;
  for (int i = 0, filled = 0; filled < k; ++i) {
    if (keys[i] < bound) continue;
    if (keys[i] == bound && ties > 0) {
      --ties;
      continue;
    }
    out[filled++] = base + tokens[i];
  }
}
