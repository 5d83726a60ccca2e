/**
 * Marks, in the title of a test or of a describe block, of what its passing shows: that a family can do this; that it is refused with a reason;
 * or that it differs from the original in a way that is said. test/families/reporter.js makes the table of docs/families.md of them.
 */
export type Capability = 'forward' | 'quantize' | 'prune' | 'gptq' | 'compressed-tensors' | 'gguf';

export function shows(family: string, capability: Capability, instead?: 'refused' | 'differs'): string {
  return `[${family}: ${capability}${instead ? ` ${instead}` : ''}]`;
}
