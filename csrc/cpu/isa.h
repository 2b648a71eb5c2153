// Builds the kernel table of one instruction set. The including file defines ADAMAS_ISA (a
// namespace), ADAMAS_ISA_NAME and ADAMAS_LANES. Everything below is internal to that file. It must not
// use inline functions of the standard library: the linker could use a copy compiled for this
// instruction set in code that runs on other processors.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

namespace adamas {
namespace ADAMAS_ISA {
namespace {

#include "cpu/simd.h"
#include "cpu/signature.h"
#include "cpu/append.h"
#include "cpu/scan.h"
#include "cpu/select.h"
#include "cpu/attend.h"

// Runs `call` with the head size as the constant D.
#define ADAMAS_FOR_HEAD_SIZE(size, call)              \
  switch (size) {                                     \
    case 32: { constexpr int D = 32; call; break; }   \
    case 64: { constexpr int D = 64; call; break; }   \
    case 80: { constexpr int D = 80; call; break; }   \
    case 96: { constexpr int D = 96; call; break; }   \
    case 112: { constexpr int D = 112; call; break; } \
    case 128: { constexpr int D = 128; call; break; } \
    case 160: { constexpr int D = 160; call; break; } \
    case 192: { constexpr int D = 192; call; break; } \
    case 224: { constexpr int D = 224; call; break; } \
    case 256: { constexpr int D = 256; call; break; } \
    case 512: { constexpr int D = 512; call; break; } \
  }

// The same with the dimensions of its signature as the constant S.
#define ADAMAS_FOR_CODED_SIZE(head_size, call)        \
  switch (coded_size(head_size)) {                    \
    case 32: { constexpr int S = 32; call; break; }   \
    case 64: { constexpr int S = 64; call; break; }   \
    case 96: { constexpr int S = 96; call; break; }   \
    case 128: { constexpr int S = 128; call; break; } \
    case 160: { constexpr int S = 160; call; break; } \
    case 192: { constexpr int S = 192; call; break; } \
    case 224: { constexpr int S = 224; call; break; } \
    case 256: { constexpr int S = 256; call; break; } \
    case 512: { constexpr int S = 512; call; break; } \
  }

#define ADAMAS_FOR_PAGE(page, call)                                                               \
  switch ((page).element) {                                                                       \
    case Element::f32: { constexpr Element E = Element::f32; ADAMAS_FOR_HEAD_SIZE((page).head_size, call) break; }   \
    case Element::bf16: { constexpr Element E = Element::bf16; ADAMAS_FOR_HEAD_SIZE((page).head_size, call) break; } \
    case Element::f16: { constexpr Element E = Element::f16; ADAMAS_FOR_HEAD_SIZE((page).head_size, call) break; }   \
    case Element::e4m3: { constexpr Element E = Element::e4m3; ADAMAS_FOR_HEAD_SIZE((page).head_size, call) break; } \
    case Element::e5m2: { constexpr Element E = Element::e5m2; ADAMAS_FOR_HEAD_SIZE((page).head_size, call) break; } \
  }

void append_any(const AppendParams& p, int64_t token) {
  ADAMAS_FOR_HEAD_SIZE(p.page.head_size, append_token<D>(p, token))
}
void encode_any(const DecodeParams& p, int row, QueryCode* codes) {
  ADAMAS_FOR_HEAD_SIZE(p.page.head_size, encode_queries<D>(p, row, codes))
}
void sample_any(const DecodeParams& p, int row, int kv_head, QueryCode* codes) {
  ADAMAS_FOR_CODED_SIZE(p.page.head_size, sample_tokens<S>(p, row, kv_head, codes))
}
void scan_any(const DecodeParams& p, int row, int first_head, int heads, const QueryCode* codes, int count,
              Combine combine, int first, int last, float* scores, int64_t stride) {
  ADAMAS_FOR_CODED_SIZE(p.page.head_size, scan_tokens<S>(p, row, first_head, heads, codes, count, combine, first,
                                                         last, scores, stride))
}
void load_query_any(const DecodeParams& p, int row, int head, float* query) {
  ADAMAS_FOR_PAGE(p.page, (load_query<E, D>(p, row, head, query)))
}
void attend_any(const DecodeParams& p, int row, int kv_head, const float* queries, int heads,
                const int32_t* tokens, int first, int count, Partial* partials) {
  ADAMAS_FOR_PAGE(p.page,
                  (attend_tokens<E, D>(p, row, kv_head, queries, heads, tokens, first, count, partials)))
}
void store_output_any(const DecodeParams& p, int row, int head, const Partial& partial) {
  ADAMAS_FOR_PAGE(p.page, (store_output<E, D>(p, row, head, partial)))
}
void gather_any(const Page& page, int64_t block, int kv_head, int count, const Rows& key,
                const Rows& value, int64_t first_row) {
  ADAMAS_FOR_HEAD_SIZE(page.head_size,
                       gather_block<D>(page, block, kv_head, count, key, value, first_row))
}

constexpr Kernels kTable = {ADAMAS_ISA_NAME, append_any,     encode_any, sample_any,       scan_any,
                            select_tokens,   load_query_any, attend_any, store_output_any, gather_any};

}  // namespace
}  // namespace ADAMAS_ISA
}  // namespace adamas
