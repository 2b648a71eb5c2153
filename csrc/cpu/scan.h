// scan: computes the scores of all context tokens from the signature planes. Per-ISA include.
//
// For each tile of 16 tokens, the planes of one KV head are read once and compared with the codes of all
// its query heads. dot: the sum over query planes p and words w of 2^p (2 |hi & q| + |lo & q|) is the
// exact integer <q, code>; the score is scale * (2 <q, code> - 3 sum(q)). manhattan: the negated sum over
// thermometer planes of |a xor b|.
//
// The maximum over a KV head's query heads compares logits less their log-sum-exp, which a sample of the tiles
// estimates first. Every backend gets the same bits: each operation is rounded on its own.

// Words whose bits are counted before the counts of bytes are summed: a byte holds 24 for each.
constexpr int kCountable = 8;

// The signatures of kLanes tokens in registers, to be scored with any number of query codes.
template <int S, bool kDot>
struct Signatures;

template <int S>
struct Signatures<S, false> {
  static constexpr int W = S / kWord;
  vu any[W], hi[W], both[W];

  inline Signatures(const uint8_t* hi_plane, const uint8_t* lo_plane) {
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      const vu lo = load<vu>(lo_plane + 4 * kTile * w);
      hi[w] = load<vu>(hi_plane + 4 * kTile * w);
      any[w] = hi[w] | lo;
      both[w] = hi[w] & lo;
    }
  }

  inline vi score(const QueryCode& q) const {
    vu total = {};
#pragma GCC unroll 2
    for (int first = 0; first < W; first += kCountable) {
      const int end = W < first + kCountable ? W : first + kCountable;
      vu distance = {};
#pragma GCC unroll 8
      for (int w = first; w < end; ++w) {
        distance += count_bits(any[w] ^ splat_word(q.planes[0][w]));
        distance += count_bits(hi[w] ^ splat_word(q.planes[1][w]));
        distance += count_bits(both[w] ^ splat_word(q.planes[2][w]));
      }
      total += sum_counts(distance);
    }
    return -(vi)total;
  }
};

#ifdef __AVX512F__
// The four bits of a nibble choose among four values of the query, and QueryCode::sums has the sum of every choice.
// One instruction looks up the nibbles of four dimensions in each byte of 16 tokens: entry 16 * i + nibble for byte
// i of a word. Another one adds the four sums of a token, times the plane's weight.
template <int S>
static inline void store_query(const int32_t* q, QueryCode* code) {
  vu bits = {};  // word i has the bits of the number i in its bytes
  for (int i = 0; i < kLanes; ++i) bits[i] = (i & 1) | (i & 2) << 7 | (i & 4) << 14 | (i & 8) << 21;
  for (int i = 0; i < S; i += 4) {
    const uint32_t four = (q[i] & 0xff) | (q[i + 1] & 0xff) << 8 | (q[i + 2] & 0xff) << 16 | uint32_t(q[i + 3]) << 24;
    const __m512i sums = _mm512_dpbusd_epi32(__m512i(), (__m512i)bits, (__m512i)splat_word(four));
    const int nibble = i / 4;
    int8_t* to = code->sums[nibble / 8 * 2 + nibble % 2] + nibble % 8 / 2 * 16;
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(sums));
  }
}

template <int S>
struct Signatures<S, true> {
  static constexpr int N = S / kWord * 2;
  vu hi[N], lo[N];

  inline Signatures(const uint8_t* hi_plane, const uint8_t* lo_plane) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const int at = 4 * kTile * (n / 2), shift = 4 * (n % 2);
      hi[n] = (load<vu>(hi_plane + at) >> shift & 0x0f0f0f0fu) | 0x30201000u;
      lo[n] = (load<vu>(lo_plane + at) >> shift & 0x0f0f0f0fu) | 0x30201000u;
    }
  }

  inline vi score(const QueryCode& q) const {
    __m512i total = (__m512i)splat_int(q.offset);
    __m512i h = {}, l = {};
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const __m512i sums = _mm512_load_si512(q.sums[n]);
      h = _mm512_add_epi8(h, _mm512_permutexvar_epi8((__m512i)hi[n], sums));
      l = _mm512_add_epi8(l, _mm512_permutexvar_epi8((__m512i)lo[n], sums));
      if (n % 4 < 3 && n < N - 1) continue;  // four sums of four values fit a byte
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(4), h);
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(2), l);
      h = l = __m512i();
    }
    return (vi)total;
  }
};
#else
template <int S>
static inline void store_query(const int32_t* q, QueryCode* code) {
  for (int b = 0; b < kQueryBits; ++b)
    for (int w = 0; w < S / kWord; ++w) code->planes[b][w] = pack_bits(q + w * kWord, 1 << b);
}

template <int S>
struct Signatures<S, true> {
  static constexpr int W = S / kWord;
  vu hi[W], lo[W];

  inline Signatures(const uint8_t* hi_plane, const uint8_t* lo_plane) {
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      hi[w] = load<vu>(hi_plane + 4 * kTile * w);
      lo[w] = load<vu>(lo_plane + 4 * kTile * w);
    }
  }

  inline vi score(const QueryCode& q) const {
    vu total = {};
#pragma GCC unroll 4
    for (int b = kQueryBits - 1; b >= 0; --b) {
      vu weighted = {};
#pragma GCC unroll 2
      for (int first = 0; first < W; first += kCountable) {
        const int end = W < first + kCountable ? W : first + kCountable;
        vu h = {}, l = {};
#pragma GCC unroll 8
        for (int w = first; w < end; ++w) {
          const vu plane = splat_word(q.planes[b][w]);
          h += count_bits(hi[w] & plane);
          l += count_bits(lo[w] & plane);
        }
        weighted += sum_counts(h + h + l);
      }
      total = b == kQueryBits - 1 ? -weighted : total + total + weighted;
    }
    return (vi)(total + total) + splat_int(q.offset);
  }
};
#endif

template <int S>
static void encode_query(const float* x, const DecodeParams& p, QueryCode* code) {
  if (p.dot) {
    vi tops = {};  // magnitudes have the order of their bits, and NaN is above infinity
    for (int i = 0; i < S; i += kLanes) {
      const vi magnitude = load<vi>(x + i) & 0x7fffffff;
      tops = magnitude > tops ? magnitude : tops;
    }
    const float top = bits_to_float(hmax(tops));
    float step = top / kQueryMax;
    if (!(step - step == 0)) step = 0.0f;  // NaN or infinite
    float inverse = step > 0 ? 1.0f / step : 0.0f;
    if (!(inverse - inverse == 0)) inverse = 0.0f;  // a step too small to invert
    alignas(64) int32_t q[S];
    vi totals = {};
    for (int i = 0; i < S; i += kLanes) {
      vf scaled = load<vf>(x + i) * inverse;
      scaled = scaled == scaled ? scaled : vf{};
      scaled = scaled > float(kQueryMax) ? splat(kQueryMax) : scaled;
      scaled = scaled < float(-kQueryMax) ? splat(-kQueryMax) : scaled;
      const vf magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to the nearest even integer
      const vi rounded = (vi)(scaled + magic) - (vi)magic;
      store(q + i, rounded);
      totals += rounded;
    }
    const float factor = step * p.logit_scale;
    code->factor = factor < kLargestFactor ? factor : kLargestFactor;
    code->offset = -3 * hsum(totals);
    store_query<S>(q, code);
  } else {
    alignas(64) int32_t codes[S];
    encode<S>(x, outer_threshold<S>(x, p.coding), codes);
    uint32_t hi[S / kWord], lo[S / kWord];
    pack_planes<S>(codes, hi, lo);
    for (int w = 0; w < S / kWord; ++w) {
      code->planes[0][w] = hi[w] | lo[w];
      code->planes[1][w] = hi[w];
      code->planes[2][w] = hi[w] & lo[w];
    }
  }
}

template <int D>
static void encode_queries(const DecodeParams& p, int row, QueryCode* codes) {
  constexpr int S = coded_size(D);
  alignas(64) float x[S], total[S];
  for (int head = 0; head < p.num_query_heads; ++head) {
    load_vector<D>(p.query, row, head, x);
    hadamard<D>(x);
    if (!p.summed()) {
      encode_query<S>(x, p, codes + head);
      continue;
    }
    const int member = head % p.group();
    for (int i = 0; i < S; ++i) total[i] = member ? total[i] + x[i] : x[i];
    if (member == p.group() - 1) encode_query<S>(total, p, codes + head / p.group());
  }
}

// Prefetches the signatures of a few KV heads, kAhead tokens or one block before the scan reaches them.
// The planes of a block are contiguous and are fetched in that order.
template <int S, bool kDot>
class Prefetcher {
 public:
  Prefetcher(const Page& page, const int32_t* blocks, int first_head, int heads, int first, int end)
      : page_(page), blocks_(blocks), first_head_(first_head), heads_(heads), token_(first), end_(end) {
    const int size = page.block_size, ahead = size < kAhead ? (kAhead + size - 1) / size * size : size;
    if (token_ < end_) locate();
    for (int i = 0; i < ahead; i += kTile) next();
  }

  inline void next() {
    if (token_ >= end_) return;
    if (token_ % page_.block_size == 0) locate();
    for (int h = 0; h < heads_; ++h) {
      for (int i = 0; i < kTile * kBytes; i += kLine) __builtin_prefetch(at_[h] + i);
      at_[h] += kTile * kBytes;
    }
    token_ += kTile;
  }

 private:
  inline void locate() {
    const int offset = token_ % page_.block_size;
    for (int h = 0; h < heads_; ++h)
      at_[h] = page_.run(blocks_[token_ / page_.block_size], first_head_ + h) + page_.hi_offset +
               offset * kBytes;
  }

  static constexpr int kAhead = 128;                     // tokens
  static constexpr int kBytes = S / 4 + (kDot ? 2 : 0);  // per token
  const Page& page_;
  const int32_t* blocks_;
  int first_head_, heads_, token_, end_;
  const uint8_t* at_[kSideBySide];
};

// The planes of one tile of one KV head.
struct Tile {
  const uint8_t *hi, *lo, *scale;
};

// The tile of a run that starts at a token of the block.
template <int S>
static inline Tile tile_at(const Page& page, const uint8_t* run, int token) {
  constexpr int kPlane = S / 8;  // bytes per token and bit plane
  return {run + page.hi_offset + token * kPlane, run + page.lo_offset + token * kPlane,
          run + page.scale_offset + token * 2};
}

template <int S>
static inline void prefetch_tile(const Tile& tile) {
  for (int i = 0; i < kTile * S / 8; i += kLine) {
    __builtin_prefetch(tile.hi + i);
    __builtin_prefetch(tile.lo + i);
  }
  __builtin_prefetch(tile.scale);
}

// Scores of one tile with the query codes of its KV head.
template <int S, bool kDot>
static inline void scan_tile(const Tile& tile, const QueryCode* codes, int count, Combine combine, float* scores,
                             int64_t stride) {
  for (int lane = 0; lane < kTile; lane += kLanes) {
    const Signatures<S, kDot> signatures(tile.hi + 4 * lane, tile.lo + 4 * lane);
    vf scale = {};
    if (kDot) scale = Convert<Element::f16>::one(tile.scale + 2 * lane);
    vf total = splat(combine == Combine::maximum ? -__builtin_inff() : 0.0f);
    for (int i = 0; i < count; ++i) {
      vf score = __builtin_convertvector(signatures.score(codes[i]), vf);
      if (kDot) score = score * scale + 0.0f;  // + 0 turns -0 into 0, which is equal
      if (combine == Combine::maximum) {
        score = rounded(score * codes[i].factor) - codes[i].log_sum;
        total = max(total, score);
      } else if (combine == Combine::sum) {
        total += score;
      } else {
        store(scores + i * stride + lane, score);
      }
    }
    if (combine != Combine::none) store(scores + lane, total);
  }
}

// log2(sum(2^x) / 2^kSampleBits) of the first `count` of n values, n a multiple of kLanes; the rest is overwritten. Powers and
// logarithm are interpolated linearly, and terms are added in fixed point, in which their order does not matter.
static inline float log_sum(float* x, int count, int n) {
  for (int i = count; i < n; ++i) x[i] = -__builtin_inff();
  vf tops = load<vf>(x);
  for (int i = kLanes; i < n; i += kLanes) tops = max(tops, load<vf>(x + i));
  const float top = hmax(tops);
  vi sums = {};
  for (int i = 0; i < n; i += kLanes) {
    vf d = load<vf>(x + i) - top;
    d = d > float(kLeastExponent) ? d : splat(kLeastExponent);
    vi floor = __builtin_convertvector(d, vi);  // towards zero
    floor += __builtin_convertvector(floor, vf) > d;  // true is -1
    const vf mantissa = 1.0f + (d - __builtin_convertvector(floor, vf));
    sums += __builtin_convertvector(mantissa * float(1 << kFractionBits), vi) >> -floor;
  }
  const uint32_t bits = float_to_bits(float(hsum(sums)));
  const float mantissa = bits_to_float((bits & 0x7fffffu) | 0x3f800000u);
  return top + (float(int(bits >> 23) - 127 - kFractionBits - kSampleBits) + (mantissa - 1.0f));
}

template <int S>
static void sample_tokens(const DecodeParams& p, int row, int kv_head, QueryCode* codes) {
  constexpr int kCodes = 4;  // scored at a time
  constexpr int kAhead = 4;  // tiles
  constexpr int kRoom = kSampleTiles * kTile;
  const Page& page = p.page;
  const int length = p.seq_lens[row], tiles = (length + kTile - 1) / kTile;
  const int sampled = tiles < kSampleTiles ? tiles : kSampleTiles, n = sampled * kTile;
  Tile sample[kSampleTiles];
  for (int i = 0; i < sampled; ++i) {
    const int token = int(int64_t(i) * tiles / sampled) * kTile;
    sample[i] = tile_at<S>(page, page.run(p.blocks(row)[token / page.block_size], kv_head), token % page.block_size);
  }
  alignas(64) float logits[kCodes * kRoom];
  for (int first = 0; first < p.group(); first += kCodes) {
    const int count = p.group() - first < kCodes ? p.group() - first : kCodes;
    for (int i = 0; i < sampled; ++i) {
      if (i + kAhead < sampled) prefetch_tile<S>(sample[i + kAhead]);
      scan_tile<S, true>(sample[i], codes + first, count, Combine::none, logits + i * kTile, kRoom);
    }
    for (int c = 0; c < count; ++c) {
      QueryCode& code = codes[first + c];
      float* x = logits + c * kRoom;
      for (int i = 0; i < n; i += kLanes) store(x + i, load<vf>(x + i) * code.factor);
      code.log_sum = log_sum(x, length < n ? length : n, n);
    }
  }
}

template <int S, bool kDot>
static void scan_as(const DecodeParams& p, int row, int first_head, int heads, const QueryCode* codes,
                    int count, Combine combine, int first, int last, float* scores, int64_t stride) {
  const Page& page = p.page;
  const int32_t* blocks = p.blocks(row);
  const int sets = combine == Combine::none ? count : 1;
  // Prefetches past the chunk, since this thread most likely scans the next one.
  Prefetcher<S, kDot> ahead(page, blocks, first_head, heads, first, p.seq_lens[row]);
  for (int start = first; start < last;) {
    const int offset = start % page.block_size;
    int end = start - offset + page.block_size;
    if (end > last) end = last;
    const uint8_t* run = page.run(blocks[start / page.block_size], first_head);
    for (int token = start, at = offset; token < end; token += kTile, at += kTile) {
      ahead.next();
      for (int h = 0; h < heads; ++h) {
        scan_tile<S, kDot>(tile_at<S>(page, run + h * page.head_stride, at), codes + h * count, count, combine,
                           scores + h * sets * stride + token, stride);
      }
    }
    start = end;
  }
}

template <int S>
static void scan_tokens(const DecodeParams& p, int row, int first_head, int heads, const QueryCode* codes,
                        int count, Combine combine, int first, int last, float* scores, int64_t stride) {
  const int sets = combine == Combine::none ? count : 1;
  for (int h = 0; h < heads; h += kSideBySide) {
    const int n = heads - h < kSideBySide ? heads - h : kSideBySide;
    (p.dot ? scan_as<S, true> : scan_as<S, false>)(p, row, first_head + h, n, codes + h * count, count, combine,
                                                   first, last, scores + h * sets * stride, stride);
  }
}
