/** The GPTQ export through PyTorch: scripts/export/gptq_torch.py, where there is a Python with torch and transformers. */
import { spawn, spawnSync } from 'node:child_process';
import { join } from 'node:path';

const SCRIPT = join(__dirname, 'gptq_torch.py');

export interface TorchResult {
  /** Nats of each token of each window but the first. */
  nll: number[];
  /** Of the first window's last position. */
  logits: number[];
}

/** `EAC_MOE_PYTHON`, or python3, if it has what the script imports; else undefined. */
export function pythonWithTorch(): string | undefined {
  const python = process.env.EAC_MOE_PYTHON ?? 'python3';
  const { status } = spawnSync(python, ['-c', 'import torch, transformers, safetensors']);
  return status === 0 ? python : undefined;
}

export async function torchNll(
  python: string,
  checkpoint: string,
  windows: number[][],
): Promise<TorchResult> {
  const child = spawn(python, [SCRIPT, checkpoint], { stdio: ['pipe', 'pipe', 'pipe'] });
  const output: string[] = [];
  const errors: string[] = [];
  child.stdout.setEncoding('utf8').on('data', (text: string) => output.push(text));
  child.stderr.setEncoding('utf8').on('data', (text: string) => errors.push(text));
  child.stdin.end(JSON.stringify({ windows }));
  const code = await new Promise<number | null>((done) => child.on('close', done));
  if (code !== 0) throw new Error(`gptq_torch.py ended with ${code}: ${errors.join('').slice(-2000)}`);
  return JSON.parse(output.join('')) as TorchResult;
}
