/** What the environment says about the hub, under the names and with the defaults of Python's huggingface_hub. */
import { readFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { EacMoeError } from '../errors';
import { client } from './client';

export interface HubSettings {
  /** HF_ENDPOINT, without a slash at its end. */
  endpoint: string;
  /** HF_HUB_CACHE, or `hub` in HF_HOME, XDG_CACHE_HOME/huggingface or ~/.cache/huggingface. */
  cache: string;
  /** `from`: the variable or file it comes from. */
  token?: { value: string; from: string };
  /** The variable that forbids to use the network. */
  offline?: string;
  /** HF_HUB_DOWNLOAD_TIMEOUT: a connection that is silent for so long is broken. Milliseconds. */
  timeout: number;
  /** Tries without any progress before giving up. */
  tries: number;
  /** Before the second try, doubled before each further one. Milliseconds. */
  pause: number;
}

const { env } = process;

/** @throws EacMoeError INVALID_ARGUMENT naming the variable */
export function hubSettings(): HubSettings {
  const endpoint = (env.HF_ENDPOINT || 'https://huggingface.co').replace(/\/+$/, '');
  if (!/^https?:\/\//.test(endpoint) || !URL.canParse(endpoint))
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `HF_ENDPOINT must be an http or https URL; found '${endpoint}'`,
    );
  const seconds = Number(env.HF_HUB_DOWNLOAD_TIMEOUT);
  return {
    endpoint,
    cache: client().getHFHubCachePath(),
    token: findToken(),
    offline: ['HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'].find((name) =>
      /^(1|on|yes|true)$/i.test(env[name] ?? ''),
    ),
    timeout: 1000 * (seconds > 0 ? seconds : 10),
    tries: 6,
    pause: 500,
  };
}

function findToken(): HubSettings['token'] {
  for (const name of ['HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN']) {
    const value = env[name]?.trim();
    if (value) return { value: checkToken(value, name), from: name };
  }
  const home = env.HF_HOME || join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'huggingface');
  const file = env.HF_TOKEN_PATH || join(home, 'token');
  try {
    const value = readFileSync(file, 'utf8').trim();
    return value ? { value: checkToken(value, file), from: file } : undefined;
  } catch (error) {
    if (error instanceof EacMoeError) throw error;
    return undefined;
  }
}

/** Says no more of a token than where it is. */
function checkToken(value: string, from: string): string {
  if (/^[\x21-\x7e]+$/.test(value)) return value;
  throw new EacMoeError('INVALID_ARGUMENT', `${from}: the token holds characters that no token has`);
}
