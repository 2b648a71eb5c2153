// Quantisation: keys to two bits per dimension, queries to a few bit planes.
#pragma once
namespace adamas {

// Bits per query element in the dot score: two's complement planes, the last one with negative weight.
constexpr int kQueryBits = 4;
constexpr int kQueryMax = (1 << (kQueryBits - 1)) - 1;

// Estimate of a query head's log-sum-exp (backends/reference/signature.py, log_sum).
constexpr int kSampleTiles = 32;
constexpr int kSampleBits = 9;  // log2 of their tokens
constexpr int kFractionBits = 18;
constexpr int kLeastExponent = -20;
constexpr float kLargestFactor = 1e25f;

// The thresholds -t, 0 and t between the four codes of a transformed key.
struct Coding {
  float threshold;
  bool relative;  // t is in units of the vector's RMS
};

}  // namespace adamas
