// From router logits to chosen experts and their weights, and what pruning does to them. All in f32, one row a token.
//
// SHAPES  logits (n × experts); weights, indices (n × top_k), in falling order of weight; an empty slot has index -1 and weight 0.
//         Ties go to the smaller expert index.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/nn/sequence.h"

namespace eac {

enum class Scoring { softmax, sigmoid, sparse_mixer };

// Softmax and sigmoid: experts are chosen by score + correction, of the `top_groups` best groups only; weights are the bare scores.
struct RouterSpec {
  Scoring scoring = Scoring::softmax;
  int64_t experts = 0, top_k = 0;
  bool renormalize = false;  // divide the chosen weights by their sum
  float scale = 1;           // multiplies the weights at the end
  float jitter = 0;          // sparse mixer: an expert competes while (max - s) / max(|s|, max) <= 2 * jitter (arXiv 2409.12136)
  std::vector<float> correction =
      {};  // (experts) or empty: balances the load, never a weight (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)
  int64_t groups = 1, top_groups = 1;  // consecutive experts (DeepSeek-V2, arXiv 2405.04434, section 2.2.2)
  int64_t group_best = 1;              // a group counts as much as its best experts together: 1 (V2) or 2 (V3)
};

void select_experts(const float* logits, int64_t n, const RouterSpec& r, float* weights, int32_t* indices);

// counts (sequences × experts) = how often each sequence chose each expert.
void count_selections(const int32_t* indices, const std::vector<Sequence>& sequences, const RouterSpec& r, int32_t* counts);

// PESF's mask (sequences × experts), 1 = kept: an expert stays if at least alpha / experts of the sequence's choices are its own (EAC-MoE, Eq. 6).
// Sequences shorter than min_tokens, and single tokens, keep all. Returns whether an expert was pruned.
bool pesf_mask(const int32_t* counts, const std::vector<Sequence>& sequences, const RouterSpec& r, double alpha,
               int64_t min_tokens, uint8_t* keep);
// alpha times the chosen experts of a token; an expert is kept if count * experts >= this * tokens. Rounded down a little, so that an expert exactly
// at the limit stays.
inline double pesf_threshold(const RouterSpec& r, double alpha) { return double(r.top_k) * alpha * (1 - 0x1p-50); }

// What a token gets when some of its experts are pruned in its sequence (mask (sequences × experts), 1 = kept):
//   drop         their terms vanish
//   renormalize  the survivors' weights are scaled to the sum that all had
//   reselect     the token chooses again among the kept experts, scores unchanged
enum class PruneMode { drop, renormalize, reselect };
void apply_expert_mask(const float* logits, const uint8_t* mask, PruneMode mode, const std::vector<Sequence>& sequences,
                       const RouterSpec& r, float* weights, int32_t* indices);

}  // namespace eac
