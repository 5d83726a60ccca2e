// Stand-ins until the real ones are there; removed when they are.
#include "kernels/cuda/context.cuh"
namespace eac::cuda {
#define MISSING(name, Args) \
  __attribute__((weak)) void name(Context&, const Args&) { throw Failure{Status::failed, #name " is not there yet"}; }
MISSING(norm, Norm)
MISSING(head_linear, HeadLinear)
MISSING(rope, Rope)
MISSING(attention, Attention)
MISSING(route, Route)
MISSING(prune, Prune)
MISSING(pesf_mask, PesfMask)
MISSING(sample, Sample)
MISSING(hessian, Hessian)
MISSING(cross, Cross)
MISSING(factor, Factor)
MISSING(two_stream, TwoStream)
MISSING(quantize, Quantize)
MISSING(calibrate_router, CalibrateRouter)
}  // namespace eac::cuda
