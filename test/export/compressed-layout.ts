/** A reader of compressed-tensors checkpoints, written from the definition of the format. */
import { join } from 'node:path';
import { describe as architectureOf } from '../../lib/architecture';
import { requiredTensors } from '../../lib/architecture/tensors';
import { moduleOf, readMatrix } from '../../lib/checkpoint/quantized';
import { openSafetensors, type SafetensorsFile } from '../../lib/checkpoint/safetensors';
import { Checkpoint } from '../../lib/checkpoint/source';
import type { QuantMatrix } from '../../types/native';
import { readJson } from '../checkpoint/helpers';

export interface Group {
  targets: string[];
  weights: { num_bits: number; symmetric: boolean; strategy: string; group_size: number | null };
}

/** How readers find a module's setting: by name, then by class; null when ignored. */
export function settingOf(config: Record<string, unknown>, module: string): Group['weights'] | null {
  const matches = (pattern: string) =>
    pattern.startsWith('re:') ? new RegExp(pattern.slice(3), 'y').test(module) : pattern === module;
  if ((config.ignore as string[]).some(matches)) return null;
  const groups = Object.values(config.config_groups as Record<string, Group>);
  const found = groups.filter((group) => group.targets.some(matches));
  expect(found.length).toBeLessThan(2);
  return (found[0] ?? groups.find((group) => group.targets.includes('Linear')))!.weights;
}

/**
 * The library's own way back, step by step: split words into 32 / bits values (3 bit: a bit string), subtract 2^(bits - 1), cut the padding,
 * then (value - zero point) * scale by group. Zero points lie along the outputs.
 */
function decompress(file: SafetensorsFile, module: string, args: Group['weights']): Float32Array {
  const bits = args.num_bits;
  const [out, inputs] = [...new BigInt64Array(file.bytes(`${module}.weight_shape`).slice().buffer)].map(
    Number,
  );
  const words = (name: string) => new Uint32Array(file.bytes(`${module}.${name}`).slice().buffer);
  const signed = (line: number[], count: number): number[] => {
    const bit = (at: number): number => (line[at >> 5]! >>> (at & 31)) & 1;
    return Array.from({ length: count }, (_, i) => {
      let value = -(2 ** (bits - 1));
      for (let b = 0; b < bits; b++) value += bit(i * bits + b) << b;
      return value;
    });
  };
  const packed = words('weight_packed');
  const row = packed.length / out!;
  const scale = file.tensor(`${module}.weight_scale`).toArray() as Float32Array;
  const groups = scale.length / out!;
  expect(file.info(`${module}.weight_scale`).shape).toEqual([out, groups]);
  const zeros: number[][] = [];
  if (!args.symmetric) {
    const column = words('weight_zero_point');
    const lines = column.length / groups;
    for (let g = 0; g < groups; g++)
      zeros.push(
        signed(
          Array.from({ length: lines }, (_, l) => column[l * groups + g]!),
          out!,
        ),
      );
  }
  const size = args.group_size ?? inputs!;
  const weights = new Float32Array(out! * inputs!);
  for (let r = 0; r < out!; r++) {
    const values = signed([...packed.subarray(r * row, (r + 1) * row)], inputs!);
    for (const [c, value] of values.entries()) {
      const g = Math.floor(c / size);
      weights[r * inputs! + c] = (value - (zeros[g]?.[r] ?? 0)) * scale[r * groups + g]!;
    }
  }
  return weights;
}

/** What is not quantized is the same. */
export function expectPlain(before: Checkpoint, after: Checkpoint): void {
  const plain = before.names().filter((name) => !/\.(qweight|qzeros|scales|g_idx)$/.test(name));
  expect(plain.length).toBeGreaterThan(5);
  const bytes = (checkpoint: Checkpoint, name: string) => Buffer.from(checkpoint.tensor(name).toBytes());
  for (const name of plain)
    expect([name, bytes(after, name).equals(bytes(before, name))]).toEqual([name, true]);
}

/** Every tensor of `source` is in `output`; quantized ones are compared in `layer`, or in all. */
export async function compare(source: string, output: string, layer?: number): Promise<void> {
  const config = readJson(join(output, 'config.json')).quantization_config as Record<string, unknown>;
  const checkpoint = Checkpoint.open(source);
  const exported = Checkpoint.open(output);
  let quantized = 0;
  expectPlain(checkpoint, exported);
  const all = requiredTensors(architectureOf(checkpoint.config));
  for (const { name, shape, layer: l, role } of all) {
    const module = moduleOf(name);
    if (!checkpoint.has(`${module}.qweight`)) {
      if (['router', 'gate', 'head'].includes(role))
        expect([name, settingOf(config, module)]).toEqual([name, null]);
      continue;
    }
    const args = settingOf(config, module)!;
    if (layer !== undefined && l !== layer) continue;
    const matrix = (await readMatrix(checkpoint, name, shape[0]!, shape[1]!)) as QuantMatrix;
    expect([args.num_bits, args.symmetric]).toEqual([matrix.bits, matrix.symmetric]);
    const file = openSafetensors(join(output, exported.info(`${module}.weight_packed`).file));
    const [found, expected] = [decompress(file, module, args), (await matrix.dequantize()).toArray()];
    expect(Buffer.from(found.buffer).equals(Buffer.from(expected.buffer))).toBe(true);
    quantized++;
    file.dispose();
  }
  expect(quantized).toBeGreaterThan(10);
  checkpoint.dispose();
  exported.dispose();
}
