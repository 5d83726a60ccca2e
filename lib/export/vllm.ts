/**
 * What vLLM can load of compressed-tensors' 'pack-quantized', weights only.
 *
 * In a MoE layer all experts' matrices share one kernel: 4 (or 8) bit, one setting for gate, up and down of all experts, groups of 32, 64
 * or 128 channels or one a row. Asymmetric experts load since vLLM's pull request 44025 (2026), SGLang's 27690. Linear layers: 4 or 8 bit in
 * the kernels that every GPU has, and one setting for q, k and v, and for gate and up, which vLLM fuses.
 *
 * Source: vllm/model_executor/layers/quantization/compressed_tensors/ (compressed_tensors_moe, schemes/compressed_tensors_wNa16) and
 * quantization/utils/marlin_utils.py.
 */
import { EacMoeError } from '../errors';
import type { ExportJob, QuantizedModule } from './job';

const BITS = 4;
const GROUP_SIZES: readonly number[] = [32, 64, 128];

const CURE = "or export with consumer 'any' (--consumer any) for another reader, or to gptq or gguf";

/** @throws EacMoeError UNSUPPORTED_MODEL, naming the module and vLLM's rule */
export function checkVllm(job: ExportJob): void {
  const fail = (what: string, cure: string): never => {
    throw new EacMoeError('UNSUPPORTED_MODEL', `${job.checkpoint.dir}: ${what}; ${cure}, ${CURE}`);
  };
  for (const module of job.modules.values()) checkModule(module, fail);
  const seen = new Map<string, { setting: string; name: string }>();
  for (const [name, fused] of fusedModules(job)) {
    const setting = settingOf(job.modules.get(name));
    const first = seen.get(fused);
    if (!first) seen.set(fused, { setting, name });
    else if (first.setting !== setting)
      fail(
        `'${first.name}' is ${first.setting} and '${name}' is ${setting}, but vLLM runs both in one kernel with one setting`,
        'quantize them alike',
      );
  }
}

function checkModule(
  { name, in: inputs, q, tensor }: QuantizedModule,
  fail: (what: string, cure: string) => never,
): void {
  const where = tensor.role === 'expert' ? 'fused MoE kernels' : 'weight-only kernels for all GPUs';
  if (q.bits !== BITS)
    fail(`'${name}' has ${q.bits} bit, but vLLM's ${where} take 4 and 8 bit only`, 'quantize it to 4 bit');
  if (q.groupSize <= inputs && !GROUP_SIZES.includes(q.groupSize))
    fail(
      `'${name}' has groups of ${q.groupSize} channels, but vLLM's ${where} take groups of ${GROUP_SIZES.join(', ')} or one a row`,
      'quantize it with one of these',
    );
}

function settingOf(module: QuantizedModule | undefined): string {
  if (!module) return 'not quantized';
  const { bits, groupSize, symmetric } = module.q;
  const group = groupSize > module.in ? 'one group a row' : `groups of ${groupSize}`;
  return `${bits} bit, ${symmetric ? 'symmetric' : 'asymmetric'}, ${group}`;
}

/** Matrices that vLLM runs as one, with a name for which. */
function* fusedModules({ modules, plain }: ExportJob): Generator<[name: string, fused: string]> {
  for (const name of [...modules.keys(), ...plain]) {
    const expert = /^(.+\.experts)\.\d+\.[^.]+$/.exec(name);
    if (expert) yield [name, expert[1]!];
    else if (/\.[qkv]_proj$/.test(name)) yield [name, name.replace(/[qkv]_proj$/, 'qkv')];
    else if (/\.(gate|up)_proj$/.test(name)) yield [name, name.replace(/(gate|up)_proj$/, 'gate_up')];
  }
}
