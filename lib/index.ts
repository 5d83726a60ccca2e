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
export type { ChatMessage, Tokenizer } from './model/tokenizer';
