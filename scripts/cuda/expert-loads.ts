/**
 * Writes test/native/cuda/expert_loads.h: expert loads for the CUDA check program, which runs where Node is not.
 *
 *   npm run cuda:loads
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { bundledSource, measureLoads, resampleLoads } from '../../lib/bench/loads';
import { inclusionProbabilities } from '../../lib/bench/routing';

export const header = join(__dirname, '../../test/native/cuda/expert_loads.h');

/** Experts and choices a token of the paper's models: Qwen1.5-MoE, DeepSeek-MoE-16B, Phi-3.5-MoE, Mixtral. */
const ROUTERS = [
  { experts: 60, topK: 4 },
  { experts: 64, topK: 6 },
  { experts: 16, topK: 2 },
  { experts: 8, topK: 2 },
];

export interface ExpertLoads {
  experts: number;
  topK: number;
  /** For each layer of the measured model: the chance of each expert to be chosen by a token, falling. */
  layers: Float64Array[];
}

export async function expertLoads(): Promise<ExpertLoads[]> {
  const loads = await measureLoads(bundledSource());
  return ROUTERS.map(({ experts, topK }) => {
    const layers = loads.map((load) => inclusionProbabilities(resampleLoads(load, experts), topK));
    return { experts, topK, layers };
  });
}

function render(all: readonly ExpertLoads[]): string {
  const rows = (layers: Float64Array[]) =>
    layers.map((layer) => `      {${Array.from(layer, (chance) => chance.toFixed(4)).join(', ')}}`);
  const entries = all.map((l) => `    {${l.experts}, ${l.topK}, {\n${rows(l.layers).join(',\n')}}}`);
  return `// Written by scripts/cuda/expert-loads.ts (npm run cuda:loads): the loads that lib/bench/loads.ts measures on the bundled model, carried over to
// the routers of other models. For each of its layers: the chance of each expert to be chosen by a token, by falling size; they sum to top_k.
#pragma once
#include <vector>

namespace eac::cuda::check {

struct ExpertLoads {
  int experts, top_k;
  std::vector<std::vector<double>> layers;
};

// clang-format off
inline const std::vector<ExpertLoads> expert_loads = {
${entries.join(',\n')}};
// clang-format on

}  // namespace eac::cuda::check
`;
}

if (require.main === module) {
  void expertLoads().then((all) => writeFileSync(header, render(all)));
}
