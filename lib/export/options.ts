/** What exporting takes and tells. */
import type { GptqVersion } from '../checkpoint/zeros';

export type ExportFormat = 'gptq' | 'compressed-tensors' | 'gguf';

export interface ExportOptions {
  format: ExportFormat;
  /** Directory to write, or file for gguf; nothing may be there. */
  output: string;
  /** Only gptq; default 2. */
  gptqVersion?: GptqVersion;
  /**
   * Only compressed-tensors. 'vllm' (default): refuse what vLLM cannot load, in its MoE layers above all. 'any': write whatever the format can
   * hold.
   */
  consumer?: 'vllm' | 'any';
  /**
   * Only gguf: relative root mean square error of the weights that a tensor may take on to become smaller; default 0. Each tensor gets the
   * smallest type within it.
   */
  maxLoss?: number;
  onProgress?: (progress: { fraction: number; message: string }) => void;
  signal?: AbortSignal;
}

/** What the tensors that became one type of the exported file weigh and lost. */
export interface ExportedType {
  /** e.g. 'Q4_0', 'BF16', or '3 bit'. */
  type: string;
  tensors: number;
  parameters: number;
  /** Of the data. */
  bytes: number;
  /** Root mean square error of the weights, relative to their root mean square; 0: equal to what was read. */
  loss: number;
  /** The largest of one tensor. */
  maxLoss: number;
}

export interface ExportReport {
  format: ExportFormat;
  output: string;
  /** Of the weight files, headers included. */
  bytes: number;
  types: ExportedType[];
  /** What readers of the format do otherwise. */
  notes: string[];
  seconds: number;
}
