/** Models to quantize, calibration for them, and comparisons of what comes out. */
import { createHash } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { MoeModel } from '../../lib/model/model';
import { seededRandom } from '../../lib/model/random';

/** The bundled model: qwen2_moe, 4 layers, 16 experts, with a tokenizer. */
export const TRIO = join(__dirname, '../../models/trio-moe-9m');

/** Calibration that takes a second: 4 sequences of 64 tokens, the same every time. */
export const FEW = { samples: 4, seqLen: 64 };

/** Random token ids, one array a sequence. */
export function randomIds(vocabSize: number, sequences = FEW.samples, length = FEW.seqLen): Int32Array[] {
  const random = seededRandom(1);
  return Array.from({ length: sequences }, () =>
    Int32Array.from({ length }, () => Math.floor(random() * vocabSize)),
  );
}

/** File name -> SHA-256. */
export function hashes(dir: string): Record<string, string> {
  const names = readdirSync(dir).sort();
  return Object.fromEntries(
    names.map((name) => [
      name,
      createHash('sha256')
        .update(readFileSync(join(dir, name)))
        .digest('hex'),
    ]),
  );
}

export async function logitsOf(model: MoeModel, ids: Int32Array): Promise<Float32Array> {
  return (await model.forward(ids)).logits;
}

/** Root of the mean squared difference, relative to that of `expected` from its mean. */
export function relativeError(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  const n = expected.length;
  let [mean, difference, spread] = [0, 0, 0];
  for (let i = 0; i < n; i++) mean += expected[i]! / n;
  for (let i = 0; i < n; i++) {
    difference += (found[i]! - expected[i]!) ** 2;
    spread += (expected[i]! - mean) ** 2;
  }
  return Math.sqrt(difference / spread);
}
