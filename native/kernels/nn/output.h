// What is done with logits: sampling and losses.
#pragma once
#include <cstdint>
#include <vector>

namespace eac {

struct Sampling {
  float temperature = 0;             // 0: the largest logit (ties: the smaller id)
  int64_t top_k = 0;                 // 0: off
  double top_p = 1;                  // 1: off
  std::vector<double> uniform = {};  // one number in [0, 1) a row
};
// One id a row of logits (n × vocabulary): softmax(logits / temperature), cut to the top_k largest and then to the smallest set
// whose probability reaches top_p, renormalised, inverted at the row's uniform number in falling order of probability (ties: the smaller id first). Probabilities are
// f32, their sums f64. NaN counts as -inf; a row whose largest logit is not finite gives that logit's id.
void sample(const float* logits, int64_t n, int64_t vocabulary, const Sampling& s, int32_t* ids);

// nll[i] = -log softmax(logits row i)[targets[i]] in nats; 0 where the target is -1.
void token_nll(const float* logits, int64_t n, int64_t vocabulary, const int32_t* targets, double* nll);
// kl[i] = KL(softmax(p row i) || softmax(q row i)) in nats.
void kl_divergence(const float* p, const float* q, int64_t n, int64_t vocabulary, double* kl);

}  // namespace eac
