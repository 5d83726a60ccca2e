/**
 * Peak memory of `quantize` on synthetic checkpoints in Qwen1.5-MoE's shape (random weights), at two depths.
 *
 *   npm run check:memory -- [--layers 2,4] [--experts 60] [--sequences 16] [--seq-len 512] [--format bf16|fp8]
 *
 * Fails when a peak is above the bound, or when the deepest model takes over 5 % more than the shallowest. The bound:
 *   float32 weights of one layer + the largest Hessian in float32 + 4 float32 hidden states a calibration token.
 * Peak: VmHWM of the quantizing process, which counts the mapped pages of the checkpoint (RssFile) too. Linux only.
 */
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { Command, Option } from 'commander';
import { describe } from '../lib/architecture';
import { requiredTensors } from '../lib/architecture/tensors';
import { normaliseConfig } from '../lib/checkpoint/config';
import { writeSynthetic, type SyntheticOptions } from '../test/synthetic';

const GROWTH = 1.05;
/** Runs against dist: ts-node's compiler would count as well. */
const CHILD = `
  const { quantizeCheckpoint } = require('./dist/quantize');
  const [source, output, sequences, seqLen] = process.argv.slice(1);
  const calibration = Array.from({ length: +sequences }, (_, s) => Int32Array.from({ length: +seqLen }, (_, t) => (s * 7919 + t * t * 31 + t) % 1024));
  quantizeCheckpoint(source, { output, bits: 3, calibration, samples: +sequences, seqLen: +seqLen, onProgress: (p) => console.log(p.message) })
    .then(() => console.log('VmHWM ' + /VmHWM:\\s*(\\d+)/.exec(require('node:fs').readFileSync('/proc/self/status', 'utf8'))[1]))
    .catch((error) => { console.error(error); process.exitCode = 1; });
`;

type Format = 'bf16' | 'fp8';

function config(layers: number, experts: number, format: Format): Record<string, unknown> {
  return {
    ...(format === 'fp8' && { quantization_config: { quant_method: 'fp8' } }),
    model_type: 'qwen2_moe',
    torch_dtype: 'bfloat16',
    vocab_size: 1024,
    hidden_size: 2048,
    num_hidden_layers: layers,
    num_attention_heads: 16,
    num_key_value_heads: 16,
    num_experts: experts,
    num_experts_per_tok: 4,
    moe_intermediate_size: 1408,
    shared_expert_intermediate_size: 5632,
    intermediate_size: 5632,
    max_position_embeddings: 8192,
    rms_norm_eps: 1e-6,
    rope_theta: 1e6,
    hidden_act: 'silu',
  };
}

/** Random codes under one small scale. */
const store: SyntheticOptions['store'] = ({ name, shape, projection }, values) => {
  if (!projection) return undefined;
  const codes = Uint8Array.from(values, (v) => ((v & 0x7f) === 0x7f ? 0 : v));
  const blocks = shape.map((n) => Math.ceil(n / 128));
  const scales = new Float32Array(blocks[0]! * blocks[1]!).fill(2 ** -10);
  return [
    { name, dtype: 'F8_E4M3', shape, data: codes },
    { name: `${name}_scale_inv`, dtype: 'F32', shape: blocks, data: new Uint8Array(scales.buffer) },
  ];
};

interface Peak {
  /** Bytes: VmHWM, and the largest RssAnon and RssFile seen. */
  total: number;
  anonymous: number;
  file: number;
}

/** Runs the child to its end and watches it. */
function measure(args: string[]): Promise<Peak> {
  const child = spawn(process.execPath, ['-e', CHILD, ...args], {
    cwd: resolve(__dirname, '..'),
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const peak: Peak = { total: 0, anonymous: 0, file: 0 };
  let message = '';
  const timer = setInterval(() => {
    try {
      const status = readFileSync(`/proc/${child.pid}/status`, 'utf8');
      const of = (key: string) => 1024 * Number(new RegExp(`${key}:\\s*(\\d+)`).exec(status)?.[1] ?? 0);
      const anonymous = of('RssAnon');
      if (process.env.EAC_MOE_VERBOSE)
        console.log(`${message.padEnd(50)} ${mb(anonymous)} + ${mb(of('RssFile'))}`);
      peak.anonymous = Math.max(peak.anonymous, anonymous);
      peak.file = Math.max(peak.file, of('RssFile'));
    } catch {
      // It has just ended.
    }
  }, 100);
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    message = text.trim().split('\n').at(-1)!;
    peak.total = 1024 * Number(/VmHWM (\d+)/.exec(text)?.[1] ?? 0);
  });
  return new Promise((done, failed) => {
    child.on('error', failed).on('close', (code) => {
      clearInterval(timer);
      if (code === 0) done(peak);
      else failed(new Error(`the quantizing process ended with code ${code}`));
    });
  });
}

function bound(experts: number, tokens: number): { weights: number; hessian: number; states: number } {
  const architecture = describe(normaliseConfig(config(1, experts, 'bf16')));
  const layer = requiredTensors(architecture).filter((t) => t.layer === 0);
  const width = Math.max(...layer.filter((t) => t.projection).map((t) => t.shape[1]!));
  return {
    weights: 4 * layer.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0),
    hessian: 4 * width ** 2,
    states: 4 * 4 * tokens * architecture.hiddenSize,
  };
}

const mb = (bytes: number) => `${Math.round(bytes / 1e6)} MB`;

async function main(): Promise<void> {
  const o = new Command('memory')
    .option('--layers <list>', 'depths to measure', '2,4')
    .option('--experts <n>', 'experts of a layer', '60')
    .option('--sequences <n>', 'calibration sequences', '16')
    .option('--seq-len <n>', 'tokens of each', '512')
    .addOption(new Option('--format <name>', 'of the source').choices(['bf16', 'fp8']).default('bf16'))
    .parse()
    .opts<{ layers: string; experts: string; sequences: string; seqLen: string; format: Format }>();
  const experts = Number(o.experts);
  const { weights, hessian, states } = bound(experts, Number(o.sequences) * Number(o.seqLen));
  const limit = weights + hessian + states;
  console.log(`bound: ${mb(limit)} = ${mb(weights)} weights + ${mb(hessian)} Hessian + ${mb(states)} states`);
  const peaks: number[] = [];
  for (const layers of o.layers.split(',').map(Number)) {
    const dir = await mkdtemp(join(tmpdir(), 'eac-moe-memory-'));
    try {
      await writeSynthetic(join(dir, 'model'), config(layers, experts, o.format), {
        ring: 2 ** 24,
        ...(o.format === 'fp8' && { store }),
      });
      const args = [join(dir, 'model'), join(dir, 'output'), o.sequences, o.seqLen];
      const { total, anonymous, file } = await measure(args);
      console.log(
        `${layers} layers: peak ${mb(total)} (anonymous up to ${mb(anonymous)}, mapped files up to ${mb(file)})`,
      );
      peaks.push(total);
    } finally {
      await rm(dir, { recursive: true, force: true });
    }
  }
  const growth = peaks.at(-1)! / peaks[0]!;
  console.log(
    `deepest / shallowest: ${growth.toFixed(3)}; highest / bound: ${(Math.max(...peaks) / limit).toFixed(3)}`,
  );
  if (growth > GROWTH || peaks.some((peak) => !(peak > 0 && peak < limit))) process.exitCode = 1;
}

main().catch((error: unknown) => {
  console.error(error instanceof Error ? error.message : error);
  process.exitCode = 1;
});
