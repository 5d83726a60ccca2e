/** A lock between processes that saves them from downloading the same files twice. What is in the cache does not depend on it. */
import { mkdir, readFile, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { dirname } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { outputError } from '../checkpoint/files';

/** The holder says so often that it lives, and is dead after so long a silence. Milliseconds. */
const SIGN_OF_LIFE = 10_000;
const SILENCE = 60_000;
const POLL = 300;

/** Runs `work` while holding the lock file `path`; `onWait` is called again and again while another process holds
 * it, and ends the waiting by throwing. */
export async function withLock<T>(
  path: string,
  { signal, onWait }: { signal?: AbortSignal; onWait: () => void },
  work: () => Promise<T>,
): Promise<T> {
  await mkdir(dirname(path), { recursive: true }).catch((cause: unknown) => {
    throw outputError(path, 0, cause);
  });
  while (!(await take(path))) {
    onWait();
    // Who aborted hears of it from onWait.
    await sleep(POLL, undefined, { signal }).catch(() => undefined);
  }
  const now = () => new Date();
  const alive = setInterval(() => void utimes(path, now(), now()).catch(() => undefined), SIGN_OF_LIFE);
  alive.unref();
  try {
    return await work();
  } finally {
    clearInterval(alive);
    await rm(path, { force: true });
  }
}

async function take(path: string): Promise<boolean> {
  try {
    await writeFile(path, `${process.pid} ${hostname()}`, { flag: 'wx' });
    return true;
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== 'EEXIST') throw outputError(path, 0, cause);
    if (await isDead(path)) await rm(path, { force: true });
    return false;
  }
}

async function isDead(path: string): Promise<boolean> {
  try {
    const [pid, host] = (await readFile(path, 'utf8')).split(' ');
    if (Date.now() - (await stat(path)).mtimeMs > SILENCE) return true;
    return host === hostname() && !runs(Number(pid));
  } catch {
    return false;
  }
}

function runs(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
