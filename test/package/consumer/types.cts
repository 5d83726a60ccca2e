import { EacMoeError, MoeModel, evaluate, pruneExperts, quantizeMoE } from 'eac-moe';
import * as kernels from 'eac-moe/kernels';

export async function compress(directory: string): Promise<string> {
  try {
    const model: MoeModel = await MoeModel.load(directory);
    const fast = pruneExperts(model, { alpha: 0.3 });
    let text = '';
    for await (const piece of fast.generate('The', { maxNewTokens: 4 })) text += piece;
    return text;
  } catch (error) {
    if (error instanceof EacMoeError) return error.code;
    throw error;
  }
}
export const functions: unknown[] = [evaluate, quantizeMoE, kernels];
// @ts-expect-error: the types are really there
export const wrong: number = MoeModel.load;
