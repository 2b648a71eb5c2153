// How vectors become bits: keys two per dimension, queries a few planes.
#pragma once
namespace adamas {

// Bits of the query in the dot score: two's complement planes, the last one negative.
constexpr int kQueryBits = 4;
constexpr int kQueryMax = (1 << (kQueryBits - 1)) - 1;

// The thresholds -t, 0 and t between the four codes of a transformed key.
struct Coding {
  float threshold;
  bool relative;  // in units of the vector's RMS
};

}  // namespace adamas
