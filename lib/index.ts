/**
 * eac-moe: compress Mixture-of-Experts language models and run them.
 *
 * QESC and PESF of EAC-MoE (ACL 2025, arXiv 2508.01625).
 */
export { EacMoeError, type ErrorCode } from './errors';
export {
  MoeModel,
  type ForwardOptions,
  type ForwardResult,
  type LayerRouting,
  type LoadOptions,
} from './model/model';
export type { GenerateOptions, GenerateResult } from './model/generate';
export type { ExpertPolicy, ExpertSelection } from './model/policy';
export type { ChatMessage, DecodeOptions, EncodeOptions, Tokenizer, TokenStream } from './model/tokenizer';
export { downloadModel, type DownloadOptions, type DownloadProgress } from './hub';
export { quantizeCheckpoint, quantizeMoE } from './quantize';
export { calibrationSequences, type CalibrationRequest } from './quantize/calibration';
export { inspectModel, type InspectOptions, type ModelInfo, type ModelSize } from './quantize/inspect';
export type {
  CalibrationSource,
  LayerReport,
  Progress,
  QuantizeOptions,
  QuantizeReport,
  RouterCalibrationSettings,
  Stage,
} from './quantize/options';
export type { Projection } from './architecture/tensors';
export type * from './architecture/types';
export type { BitsOption, PlannedModule, PlanOptions, SharedBits } from './quantize/plan';
export {
  pruneExperts,
  pruneReport,
  PesfPolicy,
  type LayerPruning,
  type PruneMode,
  type PruneOptions,
  type PruneReport,
} from './prune/pesf';
export {
  evaluate,
  type CausalResult,
  type ChoiceResult,
  type ChoiceRow,
  type EvaluateOptions,
  type EvaluateProgress,
  type Evaluation,
  type ExpertShift,
  type LayerShift,
  type ShiftRates,
} from './evaluate';
export {
  exportCheckpoint,
  type ExportedType,
  type ExportFormat,
  type ExportOptions,
  type ExportReport,
} from './export';
export type { Activations } from '../types/native';
export { version } from './version';
