import { EacMoeError } from '../../errors';
import type { ExportJob } from '../job';
import type { ExportedType } from '../options';
export async function exportGguf(_job: ExportJob): Promise<{ bytes: number; types: ExportedType[] }> {
  throw new EacMoeError('UNSUPPORTED_MODEL', 'later');
}
