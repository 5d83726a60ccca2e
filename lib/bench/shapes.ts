/** Shapes of sparse-expert layers. */
import { EacMoeError } from '../errors';

export interface LayerShape {
  name: string;
  /** Hidden size H. */
  hidden: number;
  /** Width of an expert I. */
  width: number;
  experts: number;
  topK: number;
}

export const SHAPES: readonly LayerShape[] = [
  { name: 'qwen1.5-moe', hidden: 2048, width: 1408, experts: 60, topK: 4 },
  { name: 'deepseek-moe-16b', hidden: 2048, width: 1408, experts: 64, topK: 6 },
  { name: 'mixtral', hidden: 4096, width: 14336, experts: 8, topK: 2 },
  { name: 'qwen3-30b-a3b', hidden: 2048, width: 768, experts: 128, topK: 8 },
];

/**
 * A shape by name, or from four numbers `H,I,E,K`.
 *
 * @throws EacMoeError INVALID_ARGUMENT
 */
export function parseShape(text: string): LayerShape {
  const known = SHAPES.find(({ name }) => name === text.trim().toLowerCase());
  if (known) return known;
  const parts = text.split(',');
  const numbers = parts.map((part) => (/^\s*\d+\s*$/.test(part) ? Number(part) : NaN));
  const [hidden, width, experts, topK] = numbers as [number, number, number, number];
  if (parts.length !== 4 || !numbers.every((n) => Number.isSafeInteger(n) && n > 0)) {
    const names = SHAPES.map(({ name }) => name).join(', ');
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `unknown shape '${text}': expected ${names}, or H,I,E,K (hidden size, expert width, experts, experts a token)`,
    );
  }
  if (hidden % 32 !== 0 || width % 32 !== 0) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `shape ${text}: hidden size and expert width must be multiples of 32`,
    );
  }
  if (topK > experts) {
    throw new EacMoeError('INVALID_ARGUMENT', `shape ${text}: ${topK} experts a token of only ${experts}`);
  }
  return { name: numbers.join(','), hidden, width, experts, topK };
}

/** Operations of a layer for so many (token, expert) pairs: gate, up and down, a multiplication and an addition a weight. */
export function expertOperations({ hidden, width }: LayerShape, pairs: number): number {
  return 2 * 3 * hidden * width * pairs;
}
