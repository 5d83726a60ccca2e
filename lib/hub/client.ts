/**
 * The hub's own client. Its CommonJS half is required when a model is first asked for: import() would bring in a second copy under ESM
 * and fails under jest, and whoever uses local models only need not wait for it.
 */
export function client(): typeof import('@huggingface/hub') {
  // eslint-disable-next-line @typescript-eslint/no-require-imports
  return require('@huggingface/hub') as typeof import('@huggingface/hub');
}
