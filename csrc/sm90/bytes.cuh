// Products of codes and queries as 8-bit integers on the tensor cores, which every GPU from sm_80 on has: the scorer of other
// GPUs than Hopper (csrc/sm80/scorer.cuh), and Hopper's shared scan (decode_split/shared.cuh).
#pragma once
#include <cstdint>

namespace adamas {

// c += a b: 16 rows x 32 dimensions by 32 dimensions x 8 columns, signed.
__device__ __forceinline__ void mma32(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The codes of 32 dimensions of a token: those of even dimensions in fields of two bits, and those of odd ones.
struct CodeFields {
  uint32_t even, odd;
  __device__ __forceinline__ CodeFields(uint32_t hi, uint32_t lo)
      : even(select(lo, hi << 1)), odd(select(lo >> 1, hi)) {}
  // Field n of every byte: code, 4 code or, for two fields, 16 code.
  static __device__ __forceinline__ uint32_t field(uint32_t x, int n) {
    return n < 3 ? x & 0x03030303u << 2 * n : x >> 2 & 0x30303030u;
  }

 private:
  // Every second bit of x, and the others of y; written so that it is one instruction.
  static __device__ __forceinline__ uint32_t select(uint32_t x, uint32_t y) { return ((x ^ y) & 0x55555555u) ^ y; }
};

// c += field n of the codes of two tokens per lane, by two words of 8 columns of queries.
__device__ __forceinline__ void mma_field(int (&c)[4], const CodeFields& x, const CodeFields& y, int n, uint32_t b0,
                                          uint32_t b1) {
  mma32(c, CodeFields::field(x.even, n), CodeFields::field(y.even, n), CodeFields::field(x.odd, n),
        CodeFields::field(y.odd, n), b0, b1);
}

}  // namespace adamas
