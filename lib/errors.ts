/**
 * The one error class of the library. `code` is stable; the message names the file, tensor or option and what would work.
 */
export type ErrorCode =
  /** An argument or option is out of range or of the wrong type. */
  | 'INVALID_ARGUMENT'
  /** A file or directory is missing or cannot be read. */
  | 'FILE_NOT_FOUND'
  /** A file's content contradicts its format: truncated shard, lying offsets, broken JSON. */
  | 'INVALID_CHECKPOINT'
  /** A tensor the architecture needs is missing, or has the wrong dtype or shape. */
  | 'INVALID_TENSOR'
  /** Weights or activations hold NaN or infinity. */
  | 'NON_FINITE'
  /** model_type unknown, a dense model, or a quantization we do not read. */
  | 'UNSUPPORTED_MODEL'
  /** tokenizer.json missing or unusable. */
  | 'TOKENIZER'
  /** Calibration data empty or unusable. */
  | 'CALIBRATION'
  /** The output directory holds something else, or the disk is full. */
  | 'OUTPUT'
  /** The hub has no such repository or revision, or no weights in it that can be read. */
  | 'HUB_NOT_FOUND'
  /** The hub's repository is private or gated, and the token, if there is one, does not open it. */
  | 'HUB_DENIED'
  /** No connection to the hub, a broken one, or offline mode and a model that is not in the cache. */
  | 'HUB_UNAVAILABLE'
  /** A Hessian could not be factored. */
  | 'NOT_POSITIVE_DEFINITE'
  | 'OUT_OF_MEMORY'
  /** The GPU's driver reported an error. */
  | 'DEVICE'
  /** The native addon could not be loaded. */
  | 'NATIVE_UNAVAILABLE'
  /** An AbortSignal fired. */
  | 'ABORTED'
  /** A handle was used after dispose(). */
  | 'DISPOSED'
  | 'INTERNAL';

export class EacMoeError extends Error {
  readonly code: ErrorCode;

  constructor(code: ErrorCode, message: string, options?: { cause?: unknown }) {
    super(message, options);
    this.name = 'EacMoeError';
    this.code = code;
  }
}
