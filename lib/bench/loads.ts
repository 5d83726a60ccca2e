/** How a trained model spreads its tokens over experts: measured, and carried over to another number of experts. */
import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { EacMoeError } from '../errors';
import { isHubReference } from '../hub';
import { MoeModel } from '../model/model';

export interface LoadSource {
  /** Model directory, or `hf:<owner>/<name>[@revision]`. */
  model: string;
  /** Text files. */
  texts: string[];
}

/** As in the paper's prefill and in the project's own figures. */
const WINDOW = 512;

/** The model and the texts of the repository; the published package has neither. */
export function bundledSource(): LoadSource {
  const root = join(__dirname, '..', '..');
  const texts = ['prose', 'math', 'code'].map((name) => join(root, 'scripts', 'data', `${name}.txt`));
  return { model: join(root, 'models', 'trio-moe-9m'), texts };
}

/**
 * For each MoE layer of the model, the shares of the token-expert pairs that its experts get in a window of 512 tokens, by falling size,
 * averaged over the windows of the texts. (Sorted in each window, as a prompt's favourites differ from the next one's.)
 *
 * @throws EacMoeError FILE_NOT_FOUND, INVALID_ARGUMENT when no text has 512 tokens, and those of MoeModel.load
 */
export async function measureLoads(
  { model: path, texts }: LoadSource,
  signal?: AbortSignal,
): Promise<Float64Array[]> {
  const missing = [path, ...texts].find((file) => !isHubReference(file) && !existsSync(file));
  if (missing) {
    const cure = 'expert loads are measured with --model <model> on --text <file...>';
    throw new EacMoeError('FILE_NOT_FOUND', `${missing} does not exist: ${cure}`);
  }
  using model = await MoeModel.load(path, { signal });
  const sums: Float64Array[] = [];
  let windows = 0;
  for (const text of texts) {
    const ids = model.tokenizer.encode(await readFile(text, 'utf8'));
    for (let begin = 0; begin + WINDOW <= ids.length; begin += WINDOW, windows++) {
      const window = ids.slice(begin, begin + WINDOW);
      const { routing } = await model.forward(window, { logits: 'none', routing: true, signal });
      for (const [i, layer] of routing!.entries()) {
        sums[i] ??= new Float64Array(layer.experts);
        sortedShares(layer.indices, layer.experts).forEach((share, e) => (sums[i]![e]! += share));
      }
    }
  }
  if (windows === 0) {
    throw new EacMoeError('INVALID_ARGUMENT', `no text has ${WINDOW} tokens: ${texts.join(', ')}`);
  }
  return sums.map((sum) => sum.map((share) => share / windows));
}

/** Shares of the choices by falling size; they sum to 1. */
export function sortedShares(indices: Int32Array, experts: number): Float64Array {
  const counts = new Float64Array(experts);
  for (const e of indices) if (e >= 0) counts[e]!++;
  return counts.map((count) => count / indices.length).sort((a, b) => b - a);
}

/**
 * Sorted loads of another number of experts with the same spread: the curve of loads over rank, read at as many places, and scaled to sum to 1. So
 * an expert's load relative to the mean, which is what PESF compares with α, stays what it was.
 */
export function resampleLoads(loads: Float64Array, experts: number): Float64Array {
  const last = loads.length - 1;
  const read = Float64Array.from({ length: experts }, (_, e) => {
    const place = Math.min(last, Math.max(0, ((e + 0.5) / experts) * loads.length - 0.5));
    const below = Math.floor(place);
    return loads[below]! + (place - below) * (loads[Math.min(last, below + 1)]! - loads[below]!);
  });
  const sum = read.reduce((a, b) => a + b, 0);
  return read.map((load) => load / sum);
}
