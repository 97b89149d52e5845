"""The style sheet of pages: light and dark, narrow and wide."""

CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2330;--muted:#5b6472;--line:#d9dee6;--panel:#f6f7f9;
  --text:#3b6fd4;--prefix:#0f8f83;--reused:#5fae57;--partly:#e79ab8;--recomputed:#d6336c;--computed:#d9900f;
  --padding:#a5acb8;--unmodified:#7a6fc4;--heat:#46536a;--add:#e3f5e6;--del:#fbe6ea;--chg:#fdf3da}
@media (prefers-color-scheme:dark){
:root{--bg:#12161d;--fg:#e4e8ef;--muted:#98a2b3;--line:#2d3542;--panel:#1a202a;--text:#7aa5ff;
  --prefix:#3cc5b6;--reused:#69b561;--partly:#a34a6c;--recomputed:#ff6f9f;--computed:#f0b240;--padding:#6b7484;
  --unmodified:#a99ff0;--heat:#b6c2d6;--add:#16301e;--del:#3a1a23;--chg:#332a12}
}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:22px;margin:0 0 4px}
h2{font-size:17px;margin:34px 0 8px;padding-top:10px;border-top:1px solid var(--line)}
h3{font-size:14px;margin:18px 0 6px;color:var(--muted);font-weight:600}
p{margin:6px 0}
.muted{color:var(--muted)}
code,.mono{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,monospace;font-size:12.5px}
.cards{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:8px 14px;
  min-width:104px}
.card b{display:block;font-size:20px;line-height:1.3}
.card span{color:var(--muted);font-size:12.5px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0;padding:0;list-style:none;
  font-size:13.5px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;background:var(--c);
  margin-right:6px;vertical-align:-1px}
.text{--c:var(--text)}
.prefix{--c:var(--prefix)}
.reused{--c:var(--reused)}
.partly{--c:var(--partly)}
.recomputed{--c:var(--recomputed)}
.computed{--c:var(--computed)}
.padding{--c:var(--padding)}
.unmodified{--c:var(--unmodified)}
svg{display:block;width:100%}
svg.bar{height:26px;border-radius:4px}
svg.bar rect{fill:var(--c)}
svg.heat{background:var(--panel);border:1px solid var(--line);border-radius:4px}
svg.heat path{fill:var(--heat)}
SHADES
.axis{display:flex;justify-content:space-between;gap:14px;color:var(--muted);font-size:12px;margin:2px 0 6px}
.flow{line-height:2;overflow-wrap:anywhere}
.t{background:color-mix(in srgb,var(--c) 20%,transparent);border-bottom:2px solid var(--c);
  border-radius:3px;padding:0 1px;margin-right:1px;white-space:pre-wrap;display:inline-block;
  line-height:1.45;max-width:100%}
.image{display:inline-block;border:1px solid var(--line);border-radius:6px;padding:2px 8px;
  margin:2px 4px;line-height:1.5;background:var(--panel);font-size:13px;vertical-align:middle}
.image b{color:var(--c)}
.image svg{height:6px;border-radius:3px;margin:1px 0 4px;width:240px;max-width:100%}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--muted);font-weight:600;white-space:nowrap}
td.num,th.num{text-align:right;white-space:nowrap;padding-left:12px;padding-right:22px;
  font-variant-numeric:tabular-nums}
.bars{display:grid;grid-template-columns:minmax(80px,max-content) 1fr max-content;gap:4px 10px;
  align-items:center;font-size:13.5px}
.bars .track{background:var(--panel);border-radius:3px;height:16px}
.bars .track div{height:16px;border-radius:3px;background:var(--text);min-width:1px}
.bars .bound div{background:var(--prefix)}
.bars small{color:var(--muted)}
.bars .num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.diff{border:1px solid var(--line);border-radius:6px;overflow:hidden;
  font-family:ui-monospace,"DejaVu Sans Mono",Menlo, monospace;font-size:12px;line-height:1.5}
.diff .row{display:grid;grid-template-columns:1fr 1fr}
.diff .row>div{padding:1px 8px;overflow-wrap:anywhere;min-width:0}
.diff .row>div+div{border-left:1px solid var(--line)}
.diff .add>div+div{background:var(--add)}
.diff .del>div:first-child{background:var(--del)}
.diff .chg>div{background:var(--chg)}
.diff .src{background:var(--panel);color:var(--muted);padding:2px 8px;border-top:1px solid var(--line);
  overflow-wrap:anywhere}
.diff .head{font-weight:600;background:var(--panel)}
.diff em{color:var(--muted);font-style:normal}
.mark{display:inline-block;border-radius:3px;padding:0 5px;margin-right:5px;font-size:11px;color:#fff;
  background:var(--c)}
@media (prefers-color-scheme:dark){
.mark{color:#12161d}
}
.m-frontier{--c:var(--computed)}
.m-lookup{--c:var(--prefix)}
.m-attention{--c:var(--text)}
.m-recurrent{--c:var(--unmodified)}
.m-rows{--c:var(--recomputed)}
@media (max-width:700px){
main{padding:14px 12px 40px}
h1{font-size:19px}
.diff .row{grid-template-columns:1fr}
.diff .row>div+div{border-left:0}
.diff .row>div:empty{display:none}
.diff .same>div+div{display:none}
.diff .chg>div:first-child,.diff .del>div:first-child{background:var(--del)}
.diff .chg>div+div{background:var(--add)}
.diff .head{display:none}
.bars{grid-template-columns:1fr max-content;grid-auto-flow:row dense}
.bars .track{grid-column:1/3}
.bars .num{grid-column:2}
.stack thead{display:none}
.stack tr{display:block;border-bottom:1px solid var(--line);padding:6px 0}
.stack td{display:block;border:0;padding:1px 0}
.stack td.num{text-align:left;padding-left:0}
.stack td:empty{display:none}
.stack td[data-label]::before{content:attr(data-label) ": ";color:var(--muted)}
}
""".replace("SHADES", "".join(f"svg.heat .shade-{n}{{fill-opacity:{n / 8:g}}}" for n in range(1, 9)))
