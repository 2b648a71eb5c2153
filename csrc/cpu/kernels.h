// The table of inner kernels; one instance per instruction set, chosen at run time.
// Inner kernels are single-threaded; decode.cc and append.cc run them on OpenMP threads.
#pragma once
#include "cpu/params.h"

namespace adamas {

// The code of one transformed query.
struct QueryCode {
  // dot: bit planes of the 4-bit query. manhattan: thermometer planes [c>=1], [c>=2], [c>=3].
  uint32_t planes[kQueryBits][kMaxWords];
  // dot with AVX-512, in place of the planes: the sums over every subset of four consecutive values. Dimensions
  // 32 w + 8 i + 4 h + (0..3) have their 16 sums at [2 w + h][16 i].
  alignas(64) int8_t sums[2 * kMaxWords][4 * 16];
  int32_t offset;  // dot: -3 times the sum of the query's values
  float factor;   // from dot scores to logits in base 2
  float log_sum;  // of the powers of two of a sample of logits; set by Kernels::sample
};

// How the scores of a KV head's query codes become one: not at all, their sum, or the largest logit less its
// log_sum.
enum class Combine { none, sum, maximum };

// Softmax state of one query head over some tokens; acc is in the lane order of the page's element.
struct Partial {
  float max, sum;
  float* acc;  // [padded_size], not yet divided by sum
};

// Most KV heads whose signatures are read in an interleaved way. The hardware prefetcher follows a stream only
// within a block's planes (2304 bytes at head size 64 and block size 128), and a core has few misses in flight.
// Interleaved streams reach almost twice the bandwidth of consecutive ones.
constexpr int kSideBySide = 4;

struct Kernels {
  const char* name;

  // Writes K, V and the signature of one token to its slot.
  void (*append)(const AppendParams&, int64_t token);

  // Codes of the score queries of one row: Hkv of them if queries are summed, otherwise Hq.
  void (*encode_queries)(const DecodeParams&, int row, QueryCode* codes);

  // The log_sum of each query code of a KV head, over the sampled tokens of a row.
  void (*sample)(const DecodeParams&, int row, int kv_head, QueryCode* codes);

  // Scores of tokens [first, last) of one row, for `heads` KV heads from first_head on with `count` query
  // codes each: codes[h * count + i] -> scores[(h * count + i) * stride + token], or combined in
  // scores[h * stride + token]. `first` is a multiple of kTile; whole tiles are written.
  void (*scan)(const DecodeParams&, int row, int first_head, int heads, const QueryCode* codes, int count,
               Combine combine, int first, int last, float* scores, int64_t stride);

  // The k best of scores[0, n), ties to the larger index. Writes ascending indices + base to out, which has
  // room for k + kTile; scratch has room for 2 * (n + kTile).
  void (*select)(const float* scores, int n, int k, int base, int32_t* out, int32_t* scratch);

  // Query head `head` of `row` as float[padded_size], scaled and in lane order.
  void (*load_query)(const DecodeParams&, int row, int head, float* query);

  // Softmax attention of `heads` loaded queries over `count` tokens: tokens[i], or first + i if tokens is
  // null.
  void (*attend)(const DecodeParams&, int row, int kv_head, const float* queries, int heads,
                 const int32_t* tokens, int first, int count, Partial* partials);

  // Writes acc / (sum + the head's sink) to the output, in dimension order.
  void (*store_output)(const DecodeParams&, int row, int head, const Partial&);

  // Copies K and V of `count` tokens of one block as real values, converted to the element of the rows.
  void (*gather)(const Page&, int64_t block, int kv_head, int count, const Rows& key,
                 const Rows& value, int64_t first_row);
};

const Kernels& portable_kernels();
const Kernels* avx2_kernels();    // null if not built for this architecture
const Kernels* avx512_kernels();

// The table called `isa`, or the fastest one for "auto"; null if the processor cannot run it.
const Kernels* find_kernels(const char* isa);

// The operations over OpenMP threads.
void append(const Kernels&, const AppendParams&);
void scan(const Kernels&, const DecodeParams&, float* scores, int64_t row_stride, int64_t head_stride);
void select(const Kernels&, const DecodeParams&, const float* scores, int64_t row_stride,
            int64_t head_stride, int32_t* out, int64_t out_row_stride, int64_t out_head_stride);
void decode(const Kernels&, const DecodeParams&);
void gather(const Kernels&, const DecodeParams&, const Rows& key, const Rows& value);

// Asks for 2 MiB pages under a cache: decode reads scattered rows, and with 4 KiB pages the TLB misses cost as
// much as the data. Private memory keeps its contents if nothing writes to it meanwhile; zero pages are
// populated now. Best effort; returns false if the operating system declines.
bool advise_huge(void* start, int64_t bytes);

}  // namespace adamas
