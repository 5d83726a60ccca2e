/** One side of the comparison, seen from the process that compares. */
import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';

export interface SideInfo {
  /** e.g. 'eac-moe 0.1.0' */
  name: string;
  /** Instruction sets in use. */
  cpu: string;
}

export interface SideOptions {
  threads: number;
  /** Ours only. */
  activations?: string;
  /** Ours only: 4 rounds the head while loading. */
  headBits?: 4 | 16;
  /** Ours only: baseline, avx2 or avx512. */
  isa?: string;
  /** Peer only: a folder that takes the place of its package's binaries. */
  binaries?: string;
}

export interface LoadRequest {
  /** A directory of ours, a GGUF file of the peer's. */
  path: string;
  /** Peer only: leave weights that it does not repack in the mapped file (its default), or read everything into memory. */
  mmap?: boolean;
}

interface Answer {
  result?: unknown;
  error?: { code: string; message: string };
}

/** node-llama-cpp is not installed, or has no binary for this platform. */
export class PeerUnavailable extends Error {}

const UNAVAILABLE = new Set(['ERR_MODULE_NOT_FOUND', 'NoBinaryFoundError']);

/** A child process that holds models and runs tokens through them. One call at a time. */
export class Side {
  readonly info!: SideInfo;
  readonly #child: ChildProcess;

  private constructor(child: ChildProcess) {
    this.#child = child;
  }

  /** @throws PeerUnavailable */
  static async start(which: 'ours' | 'peer', options: SideOptions): Promise<Side> {
    const child = fork(join(__dirname, 'worker.mjs'), [which], {
      execArgv: [],
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    const side = new Side(child);
    try {
      (side as { info: SideInfo }).info = (await side.#call('start', options)) as SideInfo;
    } catch (error) {
      await side.stop();
      throw error;
    }
    return side;
  }

  /** Models are numbered from 0 in the order of loading. */
  async load(request: LoadRequest): Promise<void> {
    await this.#call('load', request);
  }

  /** A new sequence: milliseconds until its next token is chosen. */
  async prefill(model: number, ids: number[]): Promise<number> {
    return (await this.#call('prefill', model, ids)) as number;
  }

  /** Feeds the sequence one token at a time, whatever was chosen: milliseconds of each. */
  async decode(model: number, ids: number[]): Promise<number[]> {
    return (await this.#call('decode', model, ids)) as number[];
  }

  /** Whether the next token's probabilities are numbers. */
  async finite(model: number, ids: number[]): Promise<boolean> {
    return (await this.#call('finite', model, ids)) as boolean;
  }

  /** Peer only: raw logits of the next token at each position. */
  async logits(model: number, ids: number[]): Promise<number[][]> {
    return (await this.#call('logits', model, ids)) as number[][];
  }

  /** Peer only: nats of each id after the ones before it, from the second on. */
  async nll(model: number, ids: number[]): Promise<number[]> {
    return (await this.#call('nll', model, ids)) as number[];
  }

  /** Peer only: by the file's own tokenizer. */
  async tokenize(model: number, text: string): Promise<number[]> {
    return (await this.#call('tokenize', model, text)) as number[];
  }

  /** Loads, and refuses a model whose results are not numbers: its time would say nothing. */
  async loadChecked(request: LoadRequest, model = 0): Promise<void> {
    await this.load(request);
    if (!(await this.finite(model, [1, 2, 3])))
      throw new Error(`${this.info.name}: ${request.path} computes NaN`);
  }

  /** Bytes, since the start. */
  async peakMemory(): Promise<number> {
    return (await this.#call('peakMemory')) as number;
  }

  async unload(): Promise<void> {
    await this.#call('unload');
  }

  async stop(): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    this.#child.kill();
    await once(this.#child, 'exit');
  }

  async #call(call: string, ...args: unknown[]): Promise<unknown> {
    const ended = new AbortController();
    const signal = ended.signal;
    try {
      this.#child.send({ call, args });
      const [answer] = (await Promise.race([
        once(this.#child, 'message', { signal }),
        once(this.#child, 'exit', { signal }).then(([code, cause]) => {
          throw new Error(
            `the process of ${this.info?.name ?? 'one side'} ended (${code ?? cause}) during ${call}`,
          );
        }),
      ])) as [Answer];
      if (!answer.error) return answer.result;
      const { code, message } = answer.error;
      throw new (UNAVAILABLE.has(code) ? PeerUnavailable : Error)(message);
    } finally {
      ended.abort();
    }
  }
}
