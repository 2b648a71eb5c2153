// Vectors of kLanes floats with the compiler's vector extensions; intrinsics only where the generic form
// compiles badly. Included once per instruction set, inside its namespace, so that no inline function
// compiled for one instruction set can be linked into another.
//
// Requires: ADAMAS_LANES (4, 8 or 16).

constexpr int kLanes = ADAMAS_LANES;
constexpr int kLine = 64;
typedef float vf __attribute__((vector_size(4 * ADAMAS_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * ADAMAS_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * ADAMAS_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * ADAMAS_LANES)));
typedef uint8_t vb __attribute__((vector_size(ADAMAS_LANES)));

template <class V>
static inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
static inline V load_half(const void* p) {  // zeros in the upper half
#ifdef __AVX512F__
  return (V)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p));
#else
  V v = {};
  __builtin_memcpy(&v, p, sizeof(V) / 2);
  return v;
#endif
}
template <class V>
static inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
static inline vf splat(float x) { return x - vf{}; }
static inline vu round_bf16(vf x) {  // bf16 in the upper half of each word, nearest even
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
  return x == x ? rounded : (u & 0xffff0000u) | 0x400000u;
}
static inline vi splat_int(int32_t x) { return x - vi{}; }
static inline vu splat_word(uint32_t x) { return x - vu{}; }
// Hides from the compiler where x comes from: a product stays rounded, and is not fused with a later sum.
static inline vf rounded(vf x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}
static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline float hmax(vf v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}
static inline int32_t hmax(vi v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}
static inline float hsum(vf v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
#endif
}

static inline int32_t hsum(vi v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
#endif
}

// Lane i of the result is the sum of the lanes of v[i].
static inline vf transpose_sum(vf* v) {
#if ADAMAS_LANES == 16
#pragma GCC unroll 4
  for (int half = 8; half >= 1; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      vf a = v[2 * i], b = v[2 * i + 1];
      v[i] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
             __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
  return v[0];
#else
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = hsum(v[i]);
  return r;
#endif
}

// e^x for x <= 0; 0 below -87. The relative error is below 3e-7.
static inline vf exp_negative(vf x) {
  vf n = x * 1.44269504088896341f;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to the nearest integer
  vf r = n + magic;
  vu e = (vu)r - (vu)magic;  // unsigned: far below -87 it wraps
  r -= magic;
  vf f = x - r * 0.693359375f;
  f = f - r * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  vf y = (vf)((vu)p + (e << 23));
  return x < -87.0f ? vf{} : y;
}

// cap * tanh(x / cap), with an absolute error below cap * 4e-7.
static inline vf soft_cap(vf x, float cap) {
  const vf e = exp_negative((x < 0.0f ? x : -x) * (2.0f / cap));
  const vf y = cap * (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -y : y;
}

// sum_counts(count_bits(x)) is the number of bits set in each word. Without an instruction for it count_bits counts those
// of each byte, so results of count_bits may be added first as long as a byte holds their sum.
static inline vu count_bits(vu x) {
#if defined(__AVX512VPOPCNTDQ__)
  return (vu)_mm512_popcnt_epi32((__m512i)x);
#elif defined(__AVX2__)
  const __m256i counts = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  return (vu)_mm256_shuffle_epi8(counts, (__m256i)(x & 0x0f0f0f0fu)) +
         (vu)_mm256_shuffle_epi8(counts, (__m256i)(x >> 4 & 0x0f0f0f0fu));
#else
  x = x - ((x >> 1) & 0x55555555u);
  x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
  return (x + (x >> 4)) & 0x0f0f0f0fu;
#endif
}
static inline vu sum_counts(vu x) {
#ifdef __AVX512VPOPCNTDQ__
  return x;
#else
  x = (x & 0x00ff00ffu) + ((x >> 8) & 0x00ff00ffu);
  return (x + (x >> 16)) & 0xffffu;
#endif
}

// Bit i of the result is set if values[i] & mask is not 0; there are 32 values.
static inline uint32_t pack_bits(const int32_t* values, int32_t mask) {
#ifdef __AVX512F__
  const __m512i m = _mm512_set1_epi32(mask);
  const uint32_t low = _mm512_test_epi32_mask(_mm512_loadu_si512(values), m);
  const uint32_t high = _mm512_test_epi32_mask(_mm512_loadu_si512(values + 16), m);
  return low | high << 16;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t((values[i] & mask) != 0) << i;
  return bits;
#endif
}

// Conversion of elements to float. load2 reads 2 * kLanes elements. For bf16 the even ones come first,
// which saves shuffles: products are summed over all of them anyway, and load_query and store_output use
// the same order.
template <Element E>
struct Convert;

static inline vf from_f16(vu h) {  // exact, subnormals and infinities included
  vf magnitude = (vf)((h & 0x7fffu) << 13) * 0x1p112f;
  vu special = (vu)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (vf)((vu)magnitude | special | ((h & 0x8000u) << 16));
}
template <>
struct Convert<Element::f32> {
  static constexpr int bytes = 4;
  static constexpr bool interleaved = false;
  static inline vf one(const uint8_t* p) { return load<vf>(p); }
  static inline void load2(const uint8_t* p, vf& a, vf& b) {
    a = one(p);
    b = one(p + 4 * kLanes);
  }
};
template <>
struct Convert<Element::bf16> {
  static constexpr int bytes = 2;
  static constexpr bool interleaved = true;
  static inline void load2(const uint8_t* p, vf& a, vf& b) {
    vu w = load<vu>(p);
    a = (vf)(w << 16);
    b = (vf)(w & 0xffff0000u);
  }
};
template <>
struct Convert<Element::f16> {
  static constexpr int bytes = 2;
  static constexpr bool interleaved = false;
  static inline vf one(const uint8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    return from_f16(__builtin_convertvector(load<vh>(p), vu));
#endif
  }
  static inline void load2(const uint8_t* p, vf& a, vf& b) {
    a = one(p);
    b = one(p + 2 * kLanes);
  }
};
template <>
struct Convert<Element::e4m3> {
  static constexpr int bytes = 1;
  static constexpr bool interleaved = false;
  static inline vf one(const uint8_t* p) {
    vu x = __builtin_convertvector(load<vb>(p), vu);
    return (vf)((vu)((vf)((x & 0x7fu) << 20) * 0x1p120f) | ((x & 0x80u) << 24));
  }
  static inline void load2(const uint8_t* p, vf& a, vf& b) {
    a = one(p);
    b = one(p + kLanes);
  }
};
template <>
struct Convert<Element::e5m2> {
  static constexpr int bytes = 1;
  static constexpr bool interleaved = false;
  static inline vf one(const uint8_t* p) {
    return from_f16(__builtin_convertvector(load<vb>(p), vu) << 8);
  }
  static inline void load2(const uint8_t* p, vf& a, vf& b) {
    a = one(p);
    b = one(p + kLanes);
  }
};

// Elements [first, first + 2 * kLanes) of a row of D as two vectors, zeros behind its end. A row ends with a pair or in
// the middle of one.
template <Element E, int D>
static inline void load_pair(const uint8_t* row, int first, vf& a, vf& b) {
  static_assert(D % kLanes == 0);
  const uint8_t* p = row + first * Convert<E>::bytes;
  if (D % (2 * kLanes) == 0 || first + 2 * kLanes <= D) {
    Convert<E>::load2(p, a, b);
  } else if constexpr (Convert<E>::interleaved) {
    const vu w = load_half<vu>(p);
    a = (vf)(w << 16);
    b = (vf)(w & 0xffff0000u);
  } else {
    a = Convert<E>::one(p);
    b = vf{};
  }
}

// Scalar conversions, used where throughput does not matter.
static inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
static inline uint16_t float_to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16) | 0x40;  // NaN stays NaN
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
// Rounds to the nearest even small float with `exponent` and `mantissa` bits. Values beyond `limit`
// saturate; NaN becomes the all-ones pattern.
static inline uint32_t float_to_small(float f, int exponent, int mantissa, float limit) {
  const uint32_t sign = (float_to_bits(f) >> 31) << (exponent + mantissa);
  float a = bits_to_float(float_to_bits(f) & 0x7fffffffu);  // also for -0
  if (f != f) return sign | ((1u << (exponent + mantissa)) - 1);
  if (a > limit) a = limit;
  const int bias = (1 << (exponent - 1)) - 1;
  const int drop = 23 - mantissa;
  int e = int(float_to_bits(a) >> 23) - 127;
  if (e < 1 - bias) {  // subnormal: the grid is 2^(1 - bias - mantissa)
    const float unit = bits_to_float(uint32_t(127 + bias - 1 + mantissa) << 23);
    float scaled = a * unit + 12582912.0f - 12582912.0f;
    return sign | uint32_t(scaled);
  }
  uint32_t u = float_to_bits(a);
  u += (1u << (drop - 1)) - 1 + ((u >> drop) & 1);
  return sign | ((u >> drop) - (uint32_t(127 - bias) << mantissa));
}
static inline float small_to_float(uint32_t x, int exponent, int mantissa) {
  const int bias = (1 << (exponent - 1)) - 1;
  const uint32_t magnitude = x & ((1u << (exponent + mantissa)) - 1);
  const float scale = bits_to_float(uint32_t(127 + 127 - bias) << 23);
  const float f = bits_to_float(magnitude << (23 - mantissa)) * scale;
  return (x >> (exponent + mantissa)) & 1 ? -f : f;
}
static inline float load_scalar(const void* base, int64_t i, Element e) {
  const uint8_t* p = (const uint8_t*)base;
  switch (e) {
    case Element::f32: return ((const float*)p)[i];
    case Element::bf16: return bits_to_float(uint32_t(((const uint16_t*)p)[i]) << 16);
    case Element::f16: {
      uint32_t h = ((const uint16_t*)p)[i];
      if ((h & 0x7c00) == 0x7c00)
        return bits_to_float(((h & 0x8000) << 16) | 0x7f800000u | ((h & 0x3ff) << 13));
      return small_to_float(h, 5, 10);
    }
    case Element::e4m3: return small_to_float(p[i], 4, 3);
    default: return small_to_float(p[i], 5, 2);
  }
}
static inline void store_scalar(void* base, int64_t i, Element e, float f) {
  switch (e) {
    case Element::f32: ((float*)base)[i] = f; break;
    case Element::bf16: ((uint16_t*)base)[i] = float_to_bf16(f); break;
    case Element::f16: {
      const bool overflow = (f < 0 ? -f : f) >= 65520.0f;  // rounds to infinity
      ((uint16_t*)base)[i] = overflow ? (f < 0 ? 0xfc00 : 0x7c00) : float_to_small(f, 5, 10, 65504.0f);
      break;
    }
    case Element::e4m3: ((uint8_t*)base)[i] = float_to_small(f, 4, 3, 448.0f); break;
    case Element::e5m2: ((uint8_t*)base)[i] = float_to_small(f, 5, 2, 57344.0f); break;
  }
}
static inline int element_bytes(Element e) {
  return e == Element::f32 ? 4 : e == Element::bf16 || e == Element::f16 ? 2 : 1;
}
